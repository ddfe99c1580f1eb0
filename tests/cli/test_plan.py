"""``jaxllm plan``: figures of the planner, a picture, and errors that say what to do."""

import json

import pytest

from jaxllm.cli.plan_picture import draw
from parallel.context import Links, PlanConfig, draw_lengths, make_plan


def pixels(path):
    from matplotlib.image import imread

    return imread(path)[..., :3]


def test_json_has_the_planners_own_figures(cli, tmp_path):
    path = tmp_path / "lengths.txt"
    path.write_text("9000 100\n\n20000\n300 300\n")
    out = tmp_path / "deep" / "picture.png"
    asked = ("--workers", "4", "--block", "512", "--node", "2", "--slowdown", "4")
    shown = cli("plan", str(path), *asked, "--strategy", "fcp-pairs", "--out", str(out), "--json")
    report = json.loads(shown.out)
    config = PlanConfig(4, 512, "fcp-pairs", links=Links(node=2, between=4.0))
    plan = make_plan([9000, 100, 20000, 300, 300], config)
    assert report["balance"]["work"] == plan.balance.work
    assert report["balance"]["cost"] == plan.balance.cost
    assert report["capacity"]["slots"] == plan.capacity.slots
    assert (report["documents"], report["tokens"]) == (5, 29_700)
    assert out.read_bytes().startswith(b"\x89PNG")


def test_a_window_sends_what_it_reaches_only(cli, tmp_path):
    path = tmp_path / "lengths.txt"
    path.write_text("20000 9000")

    def transfers(*asked):
        out = ("--out", str(tmp_path / "plan.png"), "--json")
        shown = cli("plan", str(path), "--workers", "4", "--block", "512", *asked, *out)
        return json.loads(shown.out)["balance"]["transfers"]

    assert 0 == transfers("--window", "1") < transfers("--window", "513") < transfers()
    config = PlanConfig(4, 512, window=513)
    assert transfers("--window", "513") == make_plan([20000, 9000], config).balance.transfers


@pytest.mark.parametrize("strategy", ["fcp", "document"])
def test_the_table_shows_a_distribution(cli, tmp_path, strategy):
    out = tmp_path / "plan.png"
    shown = cli(
        "plan", "log-normal", "--tokens", "300000", "--seed", "3", "--strategy", strategy, "--out", str(out)
    )
    assert shown.code == 0 and out.is_file()
    plan = make_plan(draw_lengths("log-normal", 300_000, 3), PlanConfig(8, strategy=strategy))
    for words in (
        f"{strategy} on 8 workers",
        f"{plan.balance.work:.3f}",
        f"{plan.balance.rounds} (busiest link: {plan.balance.degree} blocks)",
        f"{plan.balance.transfers:,} blocks",
    ):
        assert words in shown.out
    assert "between nodes" not in shown.out


def test_the_picture_shows_what_is_held_and_what_travels(tmp_path):
    """Colour is for documents of several blocks: in the left half where they lie, in the right one when they travel."""

    def coloured(name, lengths):
        image = pixels(draw(tmp_path / name, make_plan(lengths, PlanConfig(4, 64)), title=name))
        vivid = (image.max(-1) - image.min(-1)) > 0.35
        return vivid[:, : vivid.shape[1] // 3].sum(), vivid[:, -vivid.shape[1] // 3 :].sum()

    short, long = coloured("short.png", [60] * 16), coloured("long.png", [960])
    assert short == (0, 0)
    assert min(long) > 1000


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["zipf"], ["lengths", "zipf", "log-normal", "magiattention"]),
        (["log-normal", "--workers", "0"], ["--workers", "0", "at least 1"]),
        (["log-normal", "--block", "-4"], ["--block", "-4"]),
        (["log-normal", "--tokens", "0"], ["--tokens", "at least 1"]),
        (["log-normal", "--window", "0"], ["--window", "0", "at least 1"]),
        (["log-normal", "--slowdown", "0"], ["--slowdown", "above 0"]),
        (["log-normal", "--out", "plan.pdf"], ["--out", "plan.pdf", ".png"]),
        (["{file}", "--tokens", "9"], ["--tokens", "only with a distribution"]),
        (["{bad}"], ["bad.txt:2", "x7", "at least 1"]),
        (["{empty}"], ["lengths", "empty"]),
    ],
)
def test_mistakes_are_named(cli, tmp_path, argv, words):
    files = {"file": "5 6\n", "bad": "5\n6 x7\n", "empty": "\n"}
    for name, text in files.items():
        (tmp_path / f"{name}.txt").write_text(text)
    shown = cli("plan", *(a.format(**{name: tmp_path / f"{name}.txt" for name in files}) for a in argv))
    assert shown.code == 2
    # The panel breaks long paths over lines.
    flat = "".join(shown.err.split()).replace("│", "")
    assert all("".join(word.split()) in flat for word in words)
    assert not (tmp_path / "plan.png").exists()


def test_an_unknown_strategy_is_refused_with_the_choices(cli):
    shown = cli("plan", "log-normal", "--strategy", "star")
    assert shown.code == 2 and "fcp-pairs" in shown.err + shown.out
