"""Templates render as Hugging Face renders them, and a hostile one neither escapes nor holds the loop."""

from __future__ import annotations

import time

import pytest

from p2pdyn.text.card import CHATML
from p2pdyn.text.template import RENDER_S, ChatTemplate, TemplateError

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
LLAMA_LIKE = """{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system = "" %}
{%- endif %}
{%- for message in messages %}
    {%- if message.role not in ['user', 'assistant'] %}{{- raise_exception('bad role ' ~ message.role) }}{%- endif %}
    {{- '[' + message['role'] + '] ' + (message['content'] | trim) + '\\n' }}
    {%- if loop.last and add_generation_prompt %}{{- '[assistant] ' }}{%- endif %}
{%- endfor %}
{%- generation %}{{ system }}{% endgeneration %}"""

ESCAPES = [
    "{{ ''.__class__.__mro__ }}",
    "{{ self.__init__.__globals__ }}",
    "{{ raise_exception.__globals__['os'] }}",
    "{{ ''|attr('__class__') }}",
    "{{ messages.append(1) }}",
    "{{ '{0.__class__}'.format('') }}",
    "{% include 'x' %}",
    "{{ lipsum(9) }}",
]
GROW = "{% set ns = namespace(x=['a'], y='a') %}{% for i in range(60) %}"
BOMBS = [
    "{{ 'a' * 10**10 }}",
    "{{ [1] * 10**10 }}",
    "{{ 9**999**999 }}",
    "{{ 'a'.ljust(10**10) }}",
    "{{ '%10000000000d' % 1 }}",
    "{{ 'a'|indent(10**10) }}{{ 'a'|center(10**10) }}",
    "{{ ('a' * 100000).replace('a', 'b' * 100000) }}",
    "{{ ('a' * 100000)|replace('a', 'b' * 100000) }}",
    "{{ range(100000)|map('string')|join('a' * 1000) }}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(90) }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    GROW + "{% set ns.y = ns.y ~ ns.y %}{% endfor %}",
    GROW + "{% set ns.y = ns.y + ns.y %}{% endfor %}",
    GROW + "{% set z %}{{ ns.y }}{{ ns.y }}{% endset %}{% set ns.y = z %}{% endfor %}",
    GROW + "{% set ns.x = ns.x + ns.x %}{% endfor %}",
    GROW + "{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
    GROW + "{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x|tojson }}",
    GROW + "{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x == [ns.x] }}{{ ns.x|string|length }}",
    GROW + "{% set ns.x = (ns.x, ns.x) %}{% endfor %}{{ {ns.x: 1} }}",
    "{% for i in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
    "{{ 'a'" + "|upper" * 6000 + " }}",
]


def test_a_template_of_too_many_parts_is_refused() -> None:
    with pytest.raises(TemplateError, match="nodes"):
        ChatTemplate("{{ 1 }}" * 30_000)


def test_private_attributes_are_empty() -> None:
    assert ChatTemplate("{{ messages.__class__ }}").render(list(MESSAGES)) == ""


def test_chatml_and_a_template_of_the_usual_idioms() -> None:
    assert ChatTemplate(CHATML).render(MESSAGES) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    template = ChatTemplate(LLAMA_LIKE, bos_token="<s>")
    assert template.render(MESSAGES) == "<s>[user] Hi\n[assistant] Be brief."
    assert template.render(MESSAGES[1:], add_generation_prompt=False) == "<s>[user] Hi\n"
    with pytest.raises(TemplateError, match="refuses these messages: bad role tool"):
        template.render([{"role": "tool", "content": "x"}])


def test_json_dates_and_extra_values_are_as_hugging_face_has_them() -> None:
    assert ChatTemplate("{{ messages|tojson }}").render([{"content": "<é>"}]) == '[{"content": "<é>"}]'
    assert ChatTemplate("{{ strftime_now('%Y') }}").render([]) == time.strftime("%Y")
    assert ChatTemplate("{{ enable_thinking is false }}").render([], extra={"enable_thinking": False}) == "True"
    assert ChatTemplate("{% if tools is not none %}x{% endif %}y\n").render([]) == "y"


@pytest.mark.parametrize("source", ESCAPES)
def test_nothing_of_python_is_in_reach(source: str) -> None:
    with pytest.raises(TemplateError):
        ChatTemplate(source).render(list(MESSAGES))


@pytest.mark.parametrize("source", BOMBS, ids=range(len(BOMBS)))
def test_a_bomb_is_stopped_soon(source: str) -> None:
    began = time.thread_time()
    with pytest.raises(TemplateError):
        ChatTemplate(source).render(list(MESSAGES))
    assert time.thread_time() - began < 2 * RENDER_S + 1.0
