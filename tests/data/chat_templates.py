"""Chat templates in the styles that checkpoints carry, and conversations to render with them."""

CHATML = """
{%- if messages[0]['role'] != 'system' -%}
    {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] | trim + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif -%}
"""

# Reasoning switched on and off, thoughts of earlier turns left out, a budget told in the last user turn, tools as JSON.
NEMOTRON = """
{%- set enable_thinking = enable_thinking if enable_thinking is defined else true -%}
{%- set truncate = truncate_history_thinking if truncate_history_thinking is defined else true -%}
{%- set ns = namespace(last_user=-1, system='') -%}
{%- for message in messages -%}
    {%- if message['role'] == 'system' %}{% set ns.system = message['content'] %}{% endif -%}
    {%- if message['role'] == 'user' %}{% set ns.last_user = loop.index0 %}{% endif -%}
{%- endfor -%}
{{- bos_token -}}
{{- '<SPECIAL_10>System\\n' + ns.system -}}
{%- if tools %}
# Tools
{% for tool in tools %}
{{ tool | tojson }}
{%- endfor -%}
{%- endif -%}
{%- for message in messages -%}
    {%- if message['role'] == 'user' -%}
        {{- '\\n<SPECIAL_11>User\\n' + message['content'] -}}
        {%- if loop.index0 == ns.last_user and reasoning_budget is defined and reasoning_budget is not none -%}
            {{- '\\n\\n{thinking token budget: ' ~ reasoning_budget ~ '}' -}}
        {%- endif -%}
    {%- elif message['role'] == 'assistant' -%}
        {%- set content = message['content'] -%}
        {%- if message.reasoning_content is defined -%}
            {%- set content = '<think>\\n' + message.reasoning_content + '\\n</think>\\n' + content -%}
        {%- endif -%}
        {%- if truncate and loop.index0 < ns.last_user and '</think>' in content -%}
            {%- set content = '<think></think>' + content.split('</think>')[-1] | trim -%}
        {%- endif -%}
        {% generation %}{{- '\\n<SPECIAL_11>Assistant\\n' + content -}}{% endgeneration %}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '\\n<SPECIAL_11>Assistant\\n' -}}
    {%- if enable_thinking %}{{ '<think>\\n' }}{% else %}{{ '<think></think>' }}{% endif -%}
{%- endif -%}
"""

# Turns must alternate; the date, JSON and loop controls are used.
STRICT = """
{{- bos_token + strftime_now('%Y') + eos_token }}
{%- for message in messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
    {%- endif %}
    {%- if message['role'] == 'stop' %}{% break %}{% endif %}
    {{- '[' + message['role'] + '] ' + (message['content'] | tojson(indent=2)) }}
    {%- for call in message.tool_calls or [] %}
        {{- dict(name=call.function.name, given=call.function.arguments) | tojson }}
    {%- endfor %}
{%- endfor %}
"""

TEMPLATES = {"chatml": CHATML, "nemotron": NEMOTRON, "strict": STRICT}

CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "unit": "<é & 漢>"}}}
CONVERSATIONS = {
    "one turn": [{"role": "user", "content": "What is 2 + 2?"}],
    "history": [
        {"role": "user", "content": "  Hello <b>you</b>  "},
        {"role": "assistant", "content": "Hi.", "thinking": "They greet.\nSo do I."},
        {"role": "user", "content": "And now?", "name": None},
    ],
    "system and tools": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Add."},
        {"role": "assistant", "content": "<think>I shall.</think>\\n\\nYes", "tool_calls": [CALL]},
        {"role": "user", "content": "Go on."},
    ],
}
VARIABLES = [
    {},
    {"enable_thinking": False},
    {"truncate_history_thinking": False, "reasoning_budget": 200},
    {"tools": [{"type": "function", "function": {"name": "add", "description": "é < ü", "strict": True}}]},
]
