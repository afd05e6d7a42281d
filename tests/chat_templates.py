"""Chat templates in the styles of published models, in our own words; every one uses other corners of Jinja."""

# Of the tags {% generation %}, which 28 of 91 templates of two training projects use.
GENERATION = """{% for m in messages %}<|im_start|>{{ m.role }}
{% generation %}{{ m.content }}{% endgeneration %}<|im_end|>
{% endfor %}<|im_start|>assistant
"""
# Of what a caller leaves out: None, and not undefined.
TOOLS_NOT_NONE = """{% if tools is not none %}You may call these functions:
{% for t in tools %}{{ t }}{% endfor %}
{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}<|im_start|>assistant
"""
# As Qwen3: thinking can be switched off; a namespace finds the last question, from the end.
SWITCHED_THINKING = """{%- if tools %}{{- 'tools: ' + tools | tojson }}{%- endif %}
{%- set ns = namespace(seeking=true, last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.seeking and message.role == "user" and message.content is string %}
        {%- set ns.seeking = false %}{%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == "assistant" and '</think>' in content %}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + content.strip() + ('!' if loop.index0 > ns.last else '') }}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""
# As gpt-oss and Llama 3.1: macros, dates, an effort, and defaults for all that is not given.
EFFORT = """{%- macro head(effort) -%}
{{- "Date: " + strftime_now("%Y-%m-%d") + "\\nReasoning: " + effort }}
{%- endmacro -%}
{%- if reasoning_effort is not defined %}{%- set reasoning_effort = "medium" %}{%- endif %}
{%- if not builtin_tools is defined %}{% set builtin_tools = none %}{% endif %}
{{- head(reasoning_effort) }}{% if builtin_tools is not none %}{{ builtin_tools | join(", ") }}{% endif %}
{%- for message in messages -%}
    {%- if message.role in ["developer", "system"] and loop.first %}{% continue %}{% endif %}
    {{- "<|im_start|>" ~ message['role'] ~ "<|im_end|>" ~ message.get('content', '') | trim }}
{%- endfor -%}
{{- unk_token }}{{ "ok" if add_generation_prompt else "no" }}"""
# As Mistral and Gemma: filters over messages, roles that must take turns, no system message, other names of roles.
ALTERNATE = """{{- bos_token }}
{%- set loop_messages = messages | rejectattr("role", "equalto", "system") | list %}
{%- set system = messages | selectattr("role", "equalto", "system") | map(attribute="content") | join %}
{%- for message in loop_messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception("Roles must alternate!") }}
    {%- endif %}
    {%- set role = "model" if message.role == "assistant" else message.role %}
    {{- "[" + role | upper + "] " }}
    {%- if loop.last and system %}{{- system + "\\n\\n" }}{%- endif %}
    {{- message.content | trim }}{{ eos_token if loop.nextitem is defined }}
{%- endfor %}"""
# As Granite and Command R: documents, a dictionary's items, numbers, and whitespace control of every kind.
DOCUMENTS = """{%- if documents is not none and documents | length > 0 -%}
{%- for document in documents %}
<doc {{ loop.index }}/{{ loop.length }}>{% for key, value in document.items() | sort %}{{ key }}={{ value }};
{%- endfor %}
{%+ endfor -%}
{%- elif documents is none %}none{% endif %}
{# a comment #}
  {%- for message in messages %}
{%- filter indent(2) -%}
{{ message | tojson(indent=1, ensure_ascii=False) }}
{{ {"b": 1, "a": "ü<"} | tojson(sort_keys=true, separators=(",", ":")) }}{{ "ü" | tojson(ensure_ascii=True) }}
{%- endfilter %}
{%- if loop.index > 1 %}{% break %}{% endif %}
{%- endfor %}
{{- "%.2f" | format(1 / 3) }}{{ [1, 2, 3] | sum }}{{ cycler("x", "y").next() }}{{ joiner("|")() }}"""

ALL = (GENERATION, TOOLS_NOT_NONE, SWITCHED_THINKING, EFFORT, ALTERNATE, DOCUMENTS)
# For each template those that it has.
ARGUMENTS = {
    "enable_thinking": False,
    "reasoning_effort": "high",
    "builtin_tools": ["browser", "python"],
    "date_string": "1 Jan 2020",
    "documents": [{"title": "A", "text": "an apple"}, {"title": "B", "text": "a bear"}],
}
