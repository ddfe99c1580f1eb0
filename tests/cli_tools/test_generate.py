"""The text, where it goes, and what is said of a mistake."""

import io
import json
import shutil

import pytest

from jaxllm import LanguageModel, generate, hf


def test_the_completion_is_the_librarys(cli, folder, model):
    done = cli("generate", folder, "--prompt", "A window", "--max-new-tokens", "12", "--temperature", "0")
    assert done.code == 0, done.err
    assert done.out == generate(model, "A window", max_new_tokens=12)[0].text + "\n"


def test_sampling_flags_reach_the_sampler(cli, folder, model):
    flags = {"temperature": 1.5, "top_k": 20, "top_p": 0.9, "min_p": 0.01, "seed": 7, "max_new_tokens": 10}
    flags |= {"repetition_penalty": 1.2, "presence_penalty": 0.1, "frequency_penalty": 0.2}
    argv = [part for name, value in flags.items() for part in (f"--{name.replace('_', '-')}", value)]
    done = cli("generate", folder, "--prompt", "x", *argv, "--ignore-eos", "--stop", "zzz", "qqq", "--json")
    assert done.code == 0, done.err
    report = json.loads(done.out)
    expected = generate(model, "x", ignore_eos=True, stop=("zzz", "qqq"), **flags)[0]
    assert report["text"] == expected.text
    assert report["token_ids"] == expected.token_ids
    assert report["timings"]["new_tokens"] == len(expected.token_ids)
    assert report["settings"]["top_k"] == 20


@pytest.mark.parametrize("source", ["file", "standard input"])
def test_a_prompt_may_come_from_elsewhere(cli, folder, model, source, tmp_path, monkeypatch):
    argv = ["generate", folder, "--max-new-tokens", "5", "--temperature", "0"]
    if source == "file":
        (tmp_path / "prompt.txt").write_text("Attention é", encoding="utf-8")
        argv += ["--prompt-file", tmp_path / "prompt.txt"]
    else:
        monkeypatch.setattr("sys.stdin", io.StringIO("Attention é"))
    assert cli(*argv).out == generate(model, "Attention é", max_new_tokens=5)[0].text + "\n"


def test_the_report_stays_out_of_the_text(cli, folder, model):
    done = cli("generate", folder, "--prompt", "x", "--max-new-tokens", "4", "--temperature", "0", "--report")
    assert done.out == generate(model, "x", max_new_tokens=4)[0].text + "\n"
    assert "new tokens" in done.err and "first token" in done.err


def test_a_policy_and_its_settings_reach_the_cache(cli, folder, model):
    from jaxllm import KVCache, KVReport, Quest

    prompt = "Attention keeps every key and value; a window keeps the last ones. " * 3
    argv = ["--prompt", prompt, "--max-new-tokens", "6", "--temperature", "0", "--ignore-eos"]
    argv += ["--kv-dtype", "int8", "--page-size", "4", "--policy", "Quest"]
    argv += ["--policy-set", "budget=12", "dense_layers=[]", "--json", "--report", "--recall"]
    done = cli("generate", folder, *argv)
    assert done.code == 0, done.err
    told = KVReport(recall=True)
    policy, kv = Quest(budget=12, dense_layers=()), KVCache("int8", 4)
    (expected,) = generate(
        model, prompt, max_new_tokens=6, ignore_eos=True, policy=policy, kv=kv, kv_report=told
    )
    report = json.loads(done.out)
    assert report["token_ids"] == expected.token_ids
    assert (
        report["settings"]["policy"] | {"budget": 12, "dense_layers": [], "name": "Quest"}
        == (report["settings"]["policy"])
    )
    assert report["cache"] == json.loads(json.dumps(told.to_dict()))
    assert report["cache"]["steps"] == 5 and report["cache"]["layers"][0]["selected"] < 0.5
    words = " ".join(done.err.split())
    assert all(word in words for word in ("keys and values", "Quest", "int8", "selected", "recall"))


def test_every_policy_has_a_name():
    from jaxllm.cache import policies
    from jaxllm.cli import cache_options

    assert set(map(lambda cls: cls.__name__, cache_options.policies().values())) == set(policies.__all__)
    made = cache_options.policy_of("tactic", ["windows=[0.2, 0.5]", "mass=1"])
    assert made == policies.Tactic(windows=(0.2, 0.5), mass=1.0)
    assert cache_options.policy_of(None, ()) is None and cache_options.settings_of(None) is None


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--prompt", ""], ["--prompt", "some text"]),
        (["--prompt", "x", "--prompt-file", "y"], ["--prompt-file", "either"]),
        (["--prompt-file", "nowhere.txt"], ["nowhere.txt", "no such file"]),
        (["--prompt", "x", "--temperature", "-1"], ["temperature", "-1"]),
        (["--prompt", "x", "--top-p", "0"], ["top_p", "(0, 1]"]),
        (["--prompt", "x", "--max-new-tokens", "0"], ["max_new_tokens", "at least 1"]),
        (["--prompt", "x", "--kv-dtype", "int3"], ["kv.dtype", "int3", "bfloat16"]),
        (["--prompt", "x", "--page-size", "0"], ["kv.page_size", "at least 1"]),
        (["--prompt", "x", "--policy", "best"], ["--policy", "best", "quest", "tactic", "rkv", "dense"]),
        (["--prompt", "x", "--policy-set", "budget=9"], ["--policy-set", "only with --policy", "snapkv"]),
        (["--prompt", "x", "--policy", "quest", "--policy-set", "budget"], ["--policy-set", "NAME=VALUE"]),
        (["--prompt", "x", "--policy", "quest", "--policy-set", "budged=9"], ["policy.budged", "'budget'"]),
        (["--prompt", "x", "--policy", "rkv", "--policy-set", "budget=x"], ["policy.budget", "whole number"]),
        (["--prompt", "x", "--policy", "rkv", "--policy-set", "overrides=[]"], ["overrides", "Python"]),
        (["--prompt", "x", "--policy", "quest"], ["layers [1]", "attention layers 0 to 0"]),
        (["--prompt", "x", "--recall"], ["--recall", "--report"]),
    ],
)
def test_a_mistake_is_named(cli, folder, argv, words):
    done = cli("generate", folder, *argv)
    assert done.code == 2
    assert all(word in " ".join(done.err.replace("│", " ").split()) for word in words), done.err
    assert "Traceback" not in done.err


def test_a_folder_without_a_model_is_named(cli, tmp_path):
    done = cli("generate", tmp_path, "--prompt", "x")
    assert done.code == 2 and "config.json" in done.err
    done = cli("generate", tmp_path / "none", "--prompt", "x")
    assert done.code == 2 and "folder" in done.err


def test_a_binary_prompt_file_is_named(cli, folder, tmp_path):
    (tmp_path / "prompt.bin").write_bytes(b"\xff\xfe\x00")
    done = cli("generate", folder, "--prompt-file", tmp_path / "prompt.bin")
    assert done.code == 2 and "UTF-8" in done.err


@pytest.mark.parametrize("exported", [True, False])
def test_a_run_folder_is_a_model_too(cli, folder, tmp_path, exported):
    """Its config.json is jaxllm's own; the model is the exported one, or else the newest checkpoint."""
    run = tmp_path / "run"
    assert cli("convert", folder, run).code == 0
    if exported:
        shutil.copytree(folder, run / "hf")
        shutil.rmtree(run / "checkpoints")
    argv = ["--prompt", "A window", "--max-new-tokens", "6", "--temperature", "0"]
    assert cli("generate", run, *argv).out == cli("generate", folder, *argv).out


TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}{{ '<think>' if enable_thinking else '<no>' }}"
    "{{ '' if reasoning_budget is not defined else reasoning_budget + 1 }}"
)


@pytest.fixture(scope="module")
def talker(model, tmp_path_factory):
    told = LanguageModel(model.cfg, model.params, model.tokenizer, chat_template=TEMPLATE)
    return told, hf.save(told, tmp_path_factory.mktemp("talker") / "hf")


GREEDY = ["--max-new-tokens", "12", "--temperature", "0", "--ignore-eos", "--json"]


def test_a_chat_is_rendered_and_its_thinking_closed(cli, talker):
    told, folder = talker
    budget = ["--thinking-budget", "3", "--thinking-grace", "2", "--thinking-close", "Done.</think>"]
    done = cli("generate", folder, "--chat", "--prompt", "Hi </s>", *GREEDY, *budget)
    assert done.code == 0, done.err
    report = json.loads(done.out)
    ids = told.encode_chat([{"role": "user", "content": "Hi </s>"}], enable_thinking=True)
    assert report["settings"]["prompt"] == "[user] Hi </s><think>"
    how = dict(thinking_budget=3, thinking_grace=2, thinking_close="Done.</think>")
    (expected,) = generate(told, ids, max_new_tokens=12, ignore_eos=True, **how)
    assert report["token_ids"] == expected.token_ids and report["answer"] == expected.answer
    assert report["timings"]["thinking_tokens"] == expected.thinking_tokens > 3


def test_a_conversation_comes_from_a_file_with_the_templates_variables(cli, talker, tmp_path):
    _, folder = talker
    messages = [{"role": "system", "content": "é"}, {"role": "user", "content": "b"}]
    (tmp_path / "chat.json").write_text(json.dumps(messages))
    argv = ["--messages", tmp_path / "chat.json", "--no-enable-thinking", "--variable", "reasoning_budget=8"]
    done = cli("generate", folder, *argv, *GREEDY)
    assert done.code == 0, done.err
    assert json.loads(done.out)["settings"]["prompt"] == "[system] é[user] b<no>9"
    assert json.loads(done.out)["timings"]["thinking_tokens"] is None


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--prompt", "x", "--no-enable-thinking"], ["--no-enable-thinking", "--chat"]),
        (["--prompt", "x", "--variable", "a=1"], ["--variable", "--chat"]),
        (["--prompt", "x", "--chat", "--variable", "1=a"], ["--variable", "NAME=VALUE"]),
        (["--prompt", "x", "--messages", "chat.json"], ["--messages", "Leave one out"]),
        (["--messages", "chat.json"], ["--messages", "JSON list"]),
        (["--prompt", "x", "--thinking-grace", "2"], ["thinking_grace", "thinking_budget"]),
        (["--prompt", "x", "--chat", "--variable", "reasoning_budget=a"], ["chat template", "TypeError"]),
    ],
)
def test_a_mistake_in_a_chat_is_named(cli, talker, argv, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "chat.json").write_text('{"role": "user"}')
    done = cli("generate", talker[1], *argv)
    assert done.code == 2
    assert all(word in " ".join(done.err.replace("│", " ").split()) for word in words), done.err


def test_a_chat_without_a_template_is_named(cli, folder):
    done = cli("generate", folder, "--chat", "--prompt", "x")
    assert done.code == 2 and "chat_template" in done.err
