"""Scores against transformers on the exported model, and the adapter against the harness's own Hugging Face back end."""

import json
import logging
import math
import warnings

import numpy as np
import pytest

from jaxllm import hf
from jaxllm.evaluate import perplexity, score_documents
from tests.evaluate.tiny import TEXTS

pytestmark = pytest.mark.oracle


@pytest.fixture(scope="module")
def folder(lm, tmp_path_factory):
    return hf.save(lm, tmp_path_factory.mktemp("export") / "hf")


@pytest.fixture(scope="module")
def reference(folder):
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()


@pytest.fixture(scope="module")
def ids(lm):
    return np.array(lm.tokenizer.encode("\n".join(TEXTS), bos=True))


def guide_perplexity(model, ids, max_length, stride):
    """The strided loop of Hugging Face's perplexity guide, with each window's tokens summed instead of averaged."""
    import torch

    nll, count, previous = 0.0, 0, 0
    for begin in range(0, len(ids), stride):
        end = min(begin + max_length, len(ids))
        target_length = end - previous
        inputs = torch.tensor(ids[begin:end])[None]
        targets = inputs.clone()
        targets[:, :-target_length] = -100
        with torch.no_grad():
            logits = model(inputs, use_cache=False).logits
        losses = torch.nn.functional.cross_entropy(
            logits[0, :-1], targets[0, 1:], reduction="none", ignore_index=-100
        )
        nll += float(losses.double().sum())
        count += int((targets[0, 1:] != -100).sum())
        previous = end
        if end == len(ids):
            break
    return math.exp(nll / count), count


@pytest.mark.parametrize(("window", "stride"), [(32, 16), (48, 47), (33, 5), (4096, 2048)])
def test_strided_perplexity_equals_the_guides(lm, reference, ids, window, stride):
    expected, count = guide_perplexity(reference, ids, window, stride)
    got = perplexity(lm, ids, window=window, stride=stride)
    assert got.tokens == count == len(ids) - 1
    assert got.perplexity == pytest.approx(expected, rel=2e-5)


def test_bits_per_byte_equal_the_transformers_loss(lm, reference, folder):
    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    total = 0.0
    for text in TEXTS:
        tokens = [
            tokenizer.bos_token_id,
            *tokenizer.encode(text, add_special_tokens=False),
            tokenizer.eos_token_id,
        ]
        with torch.no_grad():
            loss = reference(
                torch.tensor(tokens)[None], labels=torch.tensor(tokens)[None], use_cache=False
            ).loss
        total += float(loss) * (len(tokens) - 1)
    expected = total / math.log(2) / sum(len(text.encode()) for text in TEXTS)
    assert score_documents(lm, TEXTS, window=4096).bits_per_byte == pytest.approx(expected, rel=2e-5)


@pytest.fixture(scope="module")
def harness(lm, folder, tmp_path_factory):
    """(our adapter, the harness's Hugging Face back end, the harness's task manager with three local tasks)."""
    with warnings.catch_warnings():
        # The harness and its metrics import much that warns; none of it is ours.
        warnings.simplefilter("ignore")
        pytest.importorskip("lm_eval", exc_type=ImportError)
        pytest.importorskip("accelerate", exc_type=ImportError)
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager

        from jaxllm.evaluate.lm_harness import JaxLM

        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        root = tmp_path_factory.mktemp("tasks")
        records = [
            {
                "question": "A window keeps",
                "choices": [" the last ones", " nothing", " every key and value"],
                "gold": 0,
            },
            {"question": "A state space model reads", "choices": [" a text once", " it twice"], "gold": 0},
            {"question": "for i in", "choices": [" range(10)", " list"], "gold": 0},
            {"question": "", "choices": ["Attention", "x"], "gold": 1},
        ]
        texts = [{"text": text} for text in TEXTS]
        (root / "choices.jsonl").write_text("\n".join(map(json.dumps, records)))
        (root / "texts.jsonl").write_text("\n".join(map(json.dumps, texts)))

        def task(name, file, body):
            data = f"dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {root / file}\ntest_split: test\n"
            (root / f"{name}.yaml").write_text(f"task: {name}\n{data}{body}")

        task(
            "tiny_choice",
            "choices.jsonl",
            "output_type: multiple_choice\ndoc_to_text: '{{question}}'\ndoc_to_choice: '{{choices}}'\n"
            "doc_to_target: gold\nmetric_list:\n  - metric: acc\n  - metric: acc_norm\n",
        )
        task(
            "tiny_rolling",
            "texts.jsonl",
            "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{text}}'\n"
            "metric_list:\n  - metric: bits_per_byte\n  - metric: word_perplexity\n",
        )
        task(
            "tiny_generate",
            "texts.jsonl",
            "output_type: generate_until\ndoc_to_text: '{{text[:20]}}'\ndoc_to_target: '{{text[20:]}}'\n"
            "generation_kwargs:\n  until: ['e', '\\n\\n']\n  max_gen_toks: 12\n"
            "metric_list:\n  - metric: exact_match\n    aggregation: mean\n    higher_is_better: true\n",
        )
        settings = {"max_length": 64, "batch_size": 2}
        ours = JaxLM(folder, **settings)
        theirs = HFLM(pretrained=str(folder), device="cpu", dtype="float32", **settings)
        yield ours, theirs, TaskManager(include_path=str(root), include_defaults=False)


def test_the_adapter_equals_the_hugging_face_back_end(harness, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    ours, theirs, manager = harness
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import lm_eval

        results = [
            lm_eval.simple_evaluate(
                model=model,
                tasks=["tiny_choice", "tiny_rolling", "tiny_generate"],
                task_manager=manager,
                log_samples=True,
                bootstrap_iters=0,
            )
            for model in (ours, theirs)
        ]
    got, expected = results
    for task in ("tiny_choice", "tiny_rolling", "tiny_generate"):
        samples = zip(got["samples"][task], expected["samples"][task], strict=True)
        for mine, other in samples:
            assert mine["doc_id"] == other["doc_id"]
            for a, b in zip(np.ravel(mine["resps"]), np.ravel(other["resps"]), strict=True):
                assert type(a) is type(b) or not isinstance(b, str)
                if (
                    isinstance(b, str)
                    and not b.lstrip("-").replace(".", "", 1).replace("e-", "", 1).isdigit()
                ):
                    assert a == b
                else:
                    assert float(a) == pytest.approx(float(b), rel=5e-5, abs=5e-5)
        for metric, value in expected["results"][task].items():
            if isinstance(value, float):
                assert got["results"][task][metric] == pytest.approx(value, rel=5e-5), (task, metric)


def test_long_contexts_are_cut_from_the_left_as_theirs_are(harness):
    from lm_eval.api.instance import Instance

    ours, theirs, _ = harness
    long = " ".join(TEXTS)
    requests = [
        Instance(request_type="loglikelihood", doc={}, arguments=(long, " ends here."), idx=0),
        Instance(request_type="loglikelihood", doc={}, arguments=("", "x"), idx=1),
        Instance(request_type="loglikelihood", doc={}, arguments=("trailing space ", "word</s>"), idx=2),
    ]
    for (a, greedy_a), (b, greedy_b) in zip(
        ours.loglikelihood(requests, disable_tqdm=True),
        theirs.loglikelihood(requests, disable_tqdm=True),
        strict=True,
    ):
        assert a == pytest.approx(b, rel=5e-5)
        assert greedy_a == greedy_b
    generation = [
        Instance(
            request_type="generate_until",
            doc={},
            arguments=(long, {"until": ["zz"], "max_gen_toks": 9}),
            idx=0,
        )
    ]
    assert ours.generate_until(generation) == theirs.generate_until(generation, disable_tqdm=True)


def test_unknown_arguments_are_named(harness, lm):
    from jaxllm import ConfigError
    from jaxllm.evaluate.lm_harness import JaxLM

    with pytest.raises(ConfigError, match="dtyp="):
        JaxLM(lm, dtyp="float32")
    with pytest.raises(ConfigError, match="num_beams"):
        harness[0]._generation_options({"num_beams": 4})
