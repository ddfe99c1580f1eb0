"""Chat templates: the text that transformers renders, and what is said of a template or a conversation that is wrong."""

from datetime import datetime

import pytest

from jaxllm import LanguageModel, MLPConfig, ModelConfig
from jaxllm.config import ConfigError
from jaxllm.data.chat import render_chat
from jaxllm.data.tokenizer import Tokenizer
from tests.data.chat_templates import CONVERSATIONS, NEMOTRON, STRICT, TEMPLATES, VARIABLES

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
ONE = CONVERSATIONS["one turn"]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(["What is 2 + 2? Hello you, be brief. Add. Yes. Go on."], 270)


def speaker(tokenizer=None, template=None):
    """A model that can only render."""
    cfg = ModelConfig(vocab_size=300, hidden_size=8, pattern="-", mlp=MLPConfig(8))
    return LanguageModel(cfg, {}, tokenizer, chat_template=template)


def test_a_nemotron_prompt_opens_thinking_unless_it_is_off():
    on = render_chat(NEMOTRON, ONE, **SPECIAL)
    assert on == "<s><SPECIAL_10>System\n\n<SPECIAL_11>User\nWhat is 2 + 2?\n<SPECIAL_11>Assistant\n<think>\n"
    off = render_chat(NEMOTRON, ONE, enable_thinking=False, **SPECIAL)
    assert off == on.replace("<think>\n", "<think></think>")
    told = render_chat(NEMOTRON, ONE, reasoning_budget=200, **SPECIAL)
    assert "2 + 2?\n\n{thinking token budget: 200}\n" in told
    assert render_chat(NEMOTRON, ONE, add_generation_prompt=False, **SPECIAL).endswith("2 + 2?")


def test_old_thoughts_are_left_out_unless_asked_for():
    history = CONVERSATIONS["history"]
    assert "They greet" not in render_chat(NEMOTRON, history, **SPECIAL)
    assert "<think>\nThey greet" in render_chat(NEMOTRON, history, truncate_history_thinking=False, **SPECIAL)


def test_json_is_not_escaped_for_html_and_the_date_is_todays():
    text = render_chat(STRICT, [{"role": "user", "content": "<é>"}], **SPECIAL)
    assert text == f'<s>{datetime.now():%Y}</s>[user] "<é>"'


@pytest.mark.parametrize(
    ("template", "messages", "words"),
    [
        (STRICT, [{"role": "assistant", "content": "I begin"}], "roles must alternate"),
        ("a\n{% if %}", ONE, r"line 2\): Expected an expression"),
        ("{{ messages[0].content + 1 }}", ONE, "TypeError.*not what it expects"),
        ("{{ messages[5].content.x }}", ONE, "has no element 5"),
        ("{{ ''.__class__.__mro__ }}", ONE, "unsafe|undefined|__class__"),
        ("{{ messages.append(1) }}", ONE, "immutable|not safely|unsafe"),
        ("{% set ns = namespace(_x=1) %}", ONE, "may not hold '_x'"),
        ("{% set ns = namespace() %}{% set ns._x = 1 %}", ONE, "may not hold '_x'"),
        ("x", [], "^messages="),
        ("x", "hello", "^messages="),
        ("x", ["hello"], r"^messages\[0\]='hello': must be a dictionary"),
        ("x", [{"content": "hello"}], r"^messages\[0\]=.*must have a \"role\""),
        ("x", [{"role": "user", "content": [object()]}], r"^messages\[0\]\.content\[0\]=.*JSON value"),
    ],
)
def test_what_is_wrong_is_named(template, messages, words):
    with pytest.raises(ConfigError, match=words):
        render_chat(template, messages, **SPECIAL)


def test_a_model_renders_with_its_own_template_and_special_tokens(tokenizer):
    model = speaker(tokenizer, NEMOTRON)
    text = model.render_chat(ONE, enable_thinking=False)
    assert text == render_chat(NEMOTRON, ONE, enable_thinking=False, **SPECIAL)
    ids = model.encode_chat(ONE, enable_thinking=False)
    assert ids[0] == tokenizer.bos_id and ids[1] != tokenizer.bos_id
    assert tokenizer.decode(ids, skip_special=False) == text
    with pytest.raises(ConfigError, match=r"^chat_template="):
        speaker(tokenizer).render_chat(ONE)
    with pytest.raises(ConfigError, match=r"^tokenizer="):
        speaker(template=NEMOTRON).encode_chat(ONE)


def test_templates_of_a_folder(tokenizer, tmp_path):
    """A file wins over the configuration; of several templates it is the default one."""
    several = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    tokenizer = Tokenizer(tokenizer._parsing, bos_id=1, config={"chat_template": several, "unk_token": "<u>"})
    assert tokenizer.chat_template == "d"
    assert tokenizer.special_tokens == {"bos_token": "<s>", "unk_token": "<u>"}
    tokenizer.save(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("file")
    assert Tokenizer.load(tmp_path).chat_template == "file"


@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", TEMPLATES)
def test_text_and_ids_are_those_of_transformers(name, tokenizer, tmp_path):
    from jinja2.exceptions import TemplateError
    from transformers import AutoTokenizer

    tokenizer.save(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(TEMPLATES[name])
    ours = speaker(Tokenizer.load(tmp_path))
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    rendered = refused = 0
    for messages in CONVERSATIONS.values():
        for variables in VARIABLES:
            for begin in (True, False):
                options = dict(add_generation_prompt=begin, **variables)
                try:
                    expected = theirs.apply_chat_template(messages, tokenize=False, **options)
                except TemplateError as error:
                    refused += 1
                    with pytest.raises(ConfigError) as told:
                        ours.render_chat(messages, **options)
                    assert str(error) in str(told.value)
                    continue
                rendered += 1
                assert ours.render_chat(messages, **options) == expected
                ids = theirs.apply_chat_template(messages, tokenize=True, return_dict=False, **options)
                assert ours.encode_chat(messages, **options) == ids
    print(f"{name}: {rendered} conversations rendered alike, {refused} refused by both")
    assert rendered >= 8 and (refused > 0) == (name == "strict")
