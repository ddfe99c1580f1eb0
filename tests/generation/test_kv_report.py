"""Figures of the cache against counts by hand: one head at a time, from the model's sizes."""

import jax
import numpy as np
import pytest

import jaxllm
from jaxllm import H2O, RKV, KVCache, KVReport, Pillar, Quest, StreamingLLM, Tactic
from jaxllm.cache.policies.base import Policy
from jaxllm.cache.state import init_cache
from jaxllm.cache.traffic import held, traffic
from jaxllm.config import AttentionConfig, MLPConfig, ModelConfig
from tests.generation.conftest import hybrid
from tests.generation.test_policies import model

K, D, PAGE = 2, 8, 4
PROMPT = list(range(1, 22))


def reported(policy=None, kv=None, prompts=(PROMPT,), recall=False, **options):
    report = KVReport(recall=recall)
    options = {"max_new_tokens": 9} | options
    jaxllm.generate(model(), list(prompts), policy=policy, kv=kv or KVCache(), kv_report=report, **options)
    return report


def test_dense_steps_read_all_that_is_stored():
    """Prompt of 21, 9 new tokens: the first comes from the prefill, then steps store 22 .. 29 tokens."""
    report = reported(KVCache() and None)
    assert report.steps == 8
    np.testing.assert_array_equal(report.stored_tokens()[:, 0], np.arange(22, 30))
    first, second, window = report.layers
    assert (first.layer, second.layer, window.layer) == (1, 3, 4)
    assert first.policy == "dense" and window.policy == "window" and first.dtype == "float32"
    assert first.selected == 1 and first.stored == first.read == 25.5 and first.most_stored == 29
    assert first.read_bytes == 25.5 * K * 2 * D * 4 and first.policy_bytes == 0 and first.recall is None
    # A ring of 7 places, the model's window.
    assert window.read == 7 and window.read_bytes == 7 * K * 2 * D * 4
    np.testing.assert_array_equal(report.read_bytes()[0], np.array([22, 22, 7]) * K * 2 * D * 4)


def test_bytes_held():
    """Two pools of 32 tokens (capacity 64 in one piece), a ring of 7, a Mamba state."""
    report = reported()
    assert report.held is not None
    assert report.held.keys_values == 2 * (2 * K * 64 * D * 4) + 2 * K * 7 * D * 4
    assert report.held.policies == report.held.tables == 0
    # conv: 3 inputs of 32 + 2 * 8 channels; matrix: 4 heads of 8 x 8.
    assert report.held.recurrent == (3 * 48 + 4 * 8 * 8) * 4
    assert report.to_dict()["held_bytes"]["total"] == report.held.total


def test_quest_in_int4_by_hand():
    """Budget of 3 pages: the open one and two sealed; codes of half a byte, scale and offset of 2 bytes."""
    report = reported(Quest(budget=12, dense_layers=(0,)), KVCache("int4", PAGE), recall=True)
    dense, quest, _ = report.layers
    stored = np.arange(22, 30)
    opened = (stored - 1) % PAGE + 1
    sealed = stored - opened
    token, open_token = 2 * (D // 2 + 4), 2 * D * 4
    assert dense.policy == "dense" and dense.dtype == quest.dtype == "int4"
    assert dense.read_bytes == K * np.mean(sealed * token + opened * open_token)
    assert quest.policy == "Quest" and quest.read == np.mean(2 * PAGE + opened)
    assert quest.read_bytes == K * np.mean(2 * PAGE * token + opened * open_token)
    assert quest.policy_bytes == K * np.mean(sealed // PAGE) * 2 * D * 4
    assert quest.selected == np.sum(2 * PAGE + opened) / np.sum(stored)
    assert dense.recall == pytest.approx(1) and 0 < quest.least_recall <= quest.recall < 1


def test_scales_of_channels_belong_to_pages():
    """Keys per channel: a scale and an offset for each of d channels of a page; values per token."""
    report = reported(kv=KVCache("int8", PAGE, keys_per_channel=True))
    stored = np.arange(22, 30)
    opened = (stored - 1) % PAGE + 1
    sealed = stored - opened
    each = sealed * (D + D + 4) + sealed // PAGE * 4 * D + opened * 2 * D * 4
    assert report.layers[0].read_bytes == K * np.mean(each)
    tactic = reported(Tactic(mass=0.5, cluster=4, sinks=1), KVCache("int8", PAGE, keys_per_channel=True))
    first = tactic.layers[0]
    # Single tokens bring their page's scales each.
    opened_mean = np.mean(opened)
    assert first.read < first.stored
    assert first.read_bytes == pytest.approx(
        K * ((first.read - opened_mean) * (D + D + 4 + 4 * D) + opened_mean * 2 * D * 4)
    )


def test_an_evicting_policy_stores_less():
    policy = RKV(budget=12, buffer=4, window=4, kernel=3)
    report = reported(policy, KVCache(page_size=PAGE), max_new_tokens=30)
    stored = report.stored_tokens()[:, 0]
    # 12 tokens after the prompt's eviction; at 16 back to 12.
    np.testing.assert_array_equal(stored[:8], [13, 14, 15, 16, 13, 14, 15, 16])
    assert report.layers[0].selected == 1 and report.layers[0].most_stored == 16


def test_pillar_counts_its_full_steps():
    policy = Pillar(budget=8, least=8, period=4)
    report = reported(policy, KVCache(page_size=PAGE), max_new_tokens=10, recall=True)
    read, stored = report._all("kv_read")[:, 0, 0], report.stored_tokens()[:, 0]
    np.testing.assert_array_equal(read == stored, np.arange(9) % 4 == 0)
    assert report.layers[0].policy_bytes == K * 8 * 4
    assert report.layers[0].recall < 1


def test_rows_and_calls_do_not_matter():
    prompts = [PROMPT, PROMPT[:5]]
    one = reported(Quest(budget=12, dense_layers=()), KVCache(page_size=PAGE), prompts, steps_per_call=7)
    other = reported(Quest(budget=12, dense_layers=()), KVCache(page_size=PAGE), prompts, max_batch=1)
    assert one.steps == other.steps == 16
    for mine, its in zip(one.layers, other.layers):
        assert (mine.read, mine.stored, mine.read_bytes) == (its.read, its.stored, its.read_bytes)


def test_a_report_starts_anew_and_changes_no_token():
    report = KVReport()
    kept = [jaxllm.generate(model(), PROMPT, max_new_tokens=6, kv_report=report)[0] for _ in range(2)]
    assert report.steps == 5
    plain = jaxllm.generate(model(), PROMPT, max_new_tokens=6)[0]
    assert kept[0].token_ids == kept[1].token_ids == plain.token_ids


def test_figures_of_taps_by_hand():
    """Two calls, rows that end, heads that differ: every figure from the steps that were taken, of all heads."""
    cfg = hybrid("*M*")
    cache = init_cache(cfg, 2, 32, KVCache("float32", PAGE), Quest(budget=12, dense_layers=()))
    report = KVReport(recall=True)
    report.begin(cfg, cache)
    rng = np.random.default_rng(0)
    seen = {"kv_read": [], "kv_stored": [], "kv_recall": []}
    for tokens in (np.array([[5, 7], [6, -1], [-1, -1]]), np.array([[3, -1]])):
        shape = (len(tokens), 2, 2, K)
        stored = np.broadcast_to(rng.integers(9, 30, shape[:3])[..., None], shape)
        # Where all is read nothing is left to differ.
        read = stored - rng.integers(0, 5, shape) * PAGE // 4
        aux = {"kv_read": read, "kv_stored": stored, "kv_recall": rng.uniform(0.1, 0.9, shape)}
        report.add(tokens, aux)
        for name, values in aux.items():
            seen[name] += [values[step, :, row] for step, row in zip(*np.nonzero(tokens >= 0))]
    read, stored, recall = (np.stack(each) for each in seen.values())
    assert report.steps == len(read) == 4
    np.testing.assert_array_equal(report.stored_tokens(), stored[..., 0])
    columns = [
        layer.keys_values(read[:, at], stored[:, at]) + layer.of_policy(stored[:, at])
        for at, layer in enumerate((traffic(cache.layers[0]), traffic(cache.layers[2])))
    ]
    np.testing.assert_array_equal(report.read_bytes(), np.stack(columns, axis=1))
    for at, layer in enumerate(report.layers):
        assert layer.stored == stored[:, at].mean() and layer.most_stored == stored[:, at].max()
        assert layer.read == read[:, at].mean()
        assert layer.selected == read[:, at].sum() / stored[:, at].sum()
        assert layer.recall == recall[:, at].mean() and layer.least_recall == recall[:, at].min()
    told = report.to_dict()
    assert told["steps"] == 4
    both = told["policy_bytes_per_step"] + told["read_bytes_per_step"]
    assert both == pytest.approx(report.read_bytes().sum(axis=1).mean())
    parts = [layer.policy_bytes for layer in report.layers]
    assert told["policy_bytes_per_step"] == sum(parts) and min(parts) > 0


def test_no_attention_no_layers():
    from tests.generation.conftest import parameters

    cfg = hybrid("M-")
    report = KVReport(recall=True)
    jaxllm.generate(jaxllm.LanguageModel(cfg, parameters(cfg)), [1, 2], max_new_tokens=3, kv_report=report)
    assert report.layers == [] and report.steps == 0 and report.held.keys_values == 0
    assert report.to_dict()["held_bytes"]["recurrent"] > 0


def test_a_single_token_takes_no_step():
    report = reported(max_new_tokens=1)
    assert report.steps == 0 and report.layers[0].selected is None and report.read_bytes().shape == (0, 3)


WIDE = ModelConfig(
    vocab_size=64,
    hidden_size=64,
    pattern="*-",
    attention=AttentionConfig(num_heads=16, num_kv_heads=4, head_dim=128),
    mlp=MLPConfig(64),
)


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (Policy(), 0),
        (StreamingLLM(), 0),
        (RKV(), 0),
        (Quest(dense_layers=()), 4 * 64 * 2 * 128 * 4),
        (H2O(), 4 * 1024 * 4),
        (Pillar(), 4 * 128 * 4),
        # 64 clusters of 16 (1,020 tokens), 129 words each; 4 queries that score 4 % of 1,020 keys of 512 bytes.
        (Tactic(), 4 * (64 * 129 * 4 + 164 * 516)),
    ],
)
def test_what_a_policy_reads_itself(policy, expected):
    cache = jax.eval_shape(lambda: init_cache(WIDE, 1, 2048, KVCache("float32", 16), policy))
    layer = traffic(cache.layers[0])
    assert layer.of_policy(np.full((1, 4), 1025)) == [expected]


def test_int4_holds_more_tokens_than_bfloat16_in_a_byte():
    """codes of 64 bytes and 4 of scales for 128 channels, against 256: 3.76 times."""
    sizes = {}
    for dtype in ("bfloat16", "int4"):
        cache = jax.eval_shape(lambda dtype=dtype: init_cache(WIDE, 1, 2**17, KVCache(dtype, 16)))
        sizes[dtype] = held(cache).keys_values
    assert sizes["bfloat16"] / sizes["int4"] > 3.6
