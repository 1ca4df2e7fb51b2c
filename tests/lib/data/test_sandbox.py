"""A chat template is a program of a stranger's: what it can reach, and how long it may run."""

import json
import time

import pytest

from stages.lib.data import sandbox
from stages.lib.run.exits import BadData, BadSetting

MESSAGES = [{"role": "user", "content": "Hi, <b>you</b>"}, {"role": "assistant", "content": "Yes."}]


def render(source: str) -> str:
    return sandbox.compiled(source, "theirs", "2026-11-25")({"messages": MESSAGES})


BOMBS = [
    "{{ 'a' * 10**9 }}",
    "{{ 10**9 * 'a' }}",
    "{{ [0] * 10**9 }}",
    "{{ 9 ** (9 ** 9) }}",
    "{% set n = namespace(x=9) %}{% for i in range(60) %}{% set n.x = n.x * n.x %}{% endfor %}",
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% for a in range(99999) recursive %}{{ loop(range(99999)) }}{% endfor %}",
    "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(300) }}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "{% set n = namespace(x=['a']) %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x %}{{ n.x }}{{ n.x }}{% endset %}"
    "{% endfor %}",
    "{{ 'a'.ljust(10**9) }}",
    "{{ 'a' | center(10**9) }}",
    "{{ 'aaaa' | indent(10**9) }}",
    "{{ [1] | batch(10**9, 'a') | list }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ '%*d' % (1000000000, 1) }}",
    "{{ '{:1000000000}'.format(1) }}",
    "{{ '{:{}}'.format(1, 1000000000) }}",
    "{{ '%1000000000d' | format(1) }}",
    "{{ ('a' * 10**5).replace('a', 'b' * 10**5) }}",
    "{{ ('a' * 10**5) | replace('a', 'b' * 10**5) }}",
    "{{ ('a' * 10**5).join('b' * 10**5) }}",
    "{% for a in range(99999) %}{{ 'a' * 10**5 }}{% endfor %}",
    "{{ range(99999) | map('string') | map('center', 99999) | join }}",
]


@pytest.mark.parametrize("source", BOMBS)
def test_a_template_that_runs_away_is_stopped(source: str) -> None:
    began = time.process_time()
    with pytest.raises(BadData, match="the chat template theirs runs away"):
        render(source)
    assert time.process_time() - began < 5


@pytest.mark.case("C7")
@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__ }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ self.__init__.__globals__ }}",
        "{{ namespace.__init__.__globals__['os'].system('x') }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
        "{{ ''.format.__globals__ }}",
        "{{ '{0.__class__.__mro__}'.format(1) }}",
        "{{ messages | attr('__class__') | attr('__mro__') }}",
        "{{ [1] | map(attribute='__class__') | map(attribute='__base__') | list }}",
    ],
)
def test_what_a_template_cannot_reach(source: str) -> None:
    import jinja2

    with pytest.raises((jinja2.TemplateError, TypeError)):
        render(
            source + "{{ [][1].x }}"
        )  # what is silently undefined would pass for an error otherwise
    try:
        said = render(source)
    except (jinja2.TemplateError, TypeError):
        return
    assert said in ("", "[Undefined]")


def test_what_templates_do_is_as_it_was() -> None:
    """Loops with all that they know, macros, joins and filters."""
    source = """
    {%- macro m(a, b='x') -%} {{ a ~ b }} {%- endmacro -%}
    {%- for message in messages if message.role -%}
      {{ loop.index }}/{{ loop.length }}{{ ':' if loop.first }}{{ '.' if loop.last }}{{ m(message.role) }}
      {{- message['content'] | trim | replace('<', '&lt;') }} {{ '%s-%02d' % ('a', 7) -}}
    {%- else -%} none {%- endfor -%}
    {%- for _ in [] -%}{%- else -%} none {%- endfor -%}
    {{ 'ab' * 3 + 'c' }}{{ 2 ** 10 }}{{ [1, 2] + [3] }}{{ nothing ~ 1 }}
    {{- messages | map(attribute='role') | join(',') }}{{ messages | tojson(indent=2) | length }}
    """
    assert render(source).split() == [
        "1/2:userxHi,", "&lt;b>you&lt;/b>", "a-072/2.assistantxYes.", "a-07noneabababc1024[1,", "2,",
        f"3]1user,assistant{len(json.dumps(MESSAGES, indent=2))}",
    ]  # fmt: skip


def test_a_template_that_is_not_valid() -> None:
    with pytest.raises(BadSetting, match="theirs is not valid at line 1"):
        render("{% for %}")
