import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from trainer.config.strict_yaml import dotted, dump, parse


def problems_of(text: str) -> list[tuple[int | None, str]]:
    return [(problem.line, problem.text) for problem in parse(text).problems]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1E5", 1e5),
        ("-2.5", -2.5),
        (".5", 0.5),
        ("3.", 3.0),
        ("7", 7),
        ("+7", 7),
        ("90_000_000", 90_000_000),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("yes", "yes"),
        ("off", "off"),
        ("1:30", "1:30"),
        ("010", "010"),
        ("0x1f", "0x1f"),
        ("2024-01-01", "2024-01-01"),
        ("'1e-4'", "1e-4"),
        ("!!str 5", "5"),
        ("[1, 2]", [1, 2]),
    ],
)
def test_scalar_has_the_value_one_would_expect(text, value):
    got = parse(f"key: {text}").value["key"]
    assert got == value
    assert type(got) is type(value)


def test_plain_pyyaml_reads_these_in_another_way():
    assert yaml.safe_load("1e-4") == "1e-4"
    assert yaml.safe_load("off") is False
    assert yaml.safe_load("010") == 8
    assert yaml.safe_load("{a: 1, a: 2}") == {"a": 2}


def test_every_key_and_item_has_its_line():
    lines = parse("a:\n  b: 1\n  c:\n    - 5\n    - 6\nd: {e: [7]}\n").lines
    assert lines == {("a",): 1, ("a", "b"): 2, ("a", "c"): 3, ("a", "c", 0): 4, ("a", "c", 1): 5} | {
        ("d",): 6,
        ("d", "e"): 6,
        ("d", "e", 0): 6,
    }


def test_duplicate_keys_are_named_with_both_lines_at_any_depth():
    assert problems_of("a:\n  b: 1\n  b: 2\na: 3\n") == [
        (3, "a.b is set twice, first on line 2; keep one of the two"),
        (4, "a is set twice, first on line 1; keep one of the two"),
    ]


def test_broken_syntax_is_one_problem_with_its_line():
    ((line, text),) = problems_of("a: 1\nb: [1, 2\nc: 3\n")
    assert line == 3
    assert text.startswith("not valid YAML: while parsing a flow sequence")
    assert "\n" not in text


def test_tab_as_indentation_is_named():
    assert problems_of("a:\n\tb: 1\n") == [
        (2, "not valid YAML: while scanning for the next token, found character '\\t' that cannot start any token")
    ]


def test_second_document_is_refused():
    ((line, text),) = problems_of("a: 1\n---\nb: 2\n")
    assert line == 2
    assert "single document" in text


def test_control_character_is_named():
    assert problems_of("a: 1\nb: x\0y\n") == [(2, "not valid YAML: the character U+0000 is not allowed")]


@pytest.mark.parametrize(
    "tag", ["!!python/object/apply:os.system ['true']", "!!python/name:os.system", "!mine 5", "!!binary aa"]
)
def test_tags_of_other_types_are_refused_and_nothing_is_run(tag):
    ((line, text),) = problems_of(f"a: 1\nb: {tag}\n")
    assert line == 2
    assert text == f"b has the tag {tag.split()[0]}, tags are not allowed"


def test_tag_that_does_not_fit_its_value_is_refused():
    assert problems_of("a: !!int abc") == [(1, "a has the tag !!int but its value is 'abc'")]


def test_alias_is_refused():
    assert problems_of("a: &x [1]\nb: *x\n") == [
        (2, "not valid YAML: aliases (*x) are not supported, write the value out")
    ]


@pytest.mark.parametrize("text", [".inf", "-.inf", ".nan", "1e999"])
def test_numbers_that_are_not_finite_are_refused(text):
    assert problems_of(f"a: {text}") == [(1, f"a must be a finite number, got {text}")]


def test_absurdly_long_number_is_refused():
    assert problems_of("a: 1" + "0" * 5000) == [(1, "a is a number of more than 19 digits")]


@pytest.mark.parametrize("text", ["[" * 100_000, "[" * 40 + "]" * 40])
def test_absurdly_deep_nesting_is_refused(text):
    assert problems_of(text) == [(None, "not valid YAML: nested too deeply")]


def test_key_that_is_no_text_is_refused():
    assert problems_of("a:\n  ? [1, 2]\n  : 3\n") == [(2, "a has a key that is no text")]


def test_path_is_written_as_one_would_type_it():
    assert dotted(("generator", "channel_multipliers", 1)) == "generator.channel_multipliers[1]"


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(10**17), 10**17)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs", "Cc"]))
    | st.sampled_from(
        [
            "1e-4",
            "1e5",
            "yes",
            "no",
            "null",
            "~",
            "1_000",
            "010",
            "1:30",
            "0x10",
            ".5",
            "true",
            "",
            " ",
            "<<",
            "*a",
            "!x",
        ]
    )
)


@given(st.dictionaries(st.text("abcxyz_", min_size=1), SCALARS | st.lists(SCALARS, max_size=4), max_size=5))
def test_dump_is_read_back_equal(values):
    document = parse(dump({"section": values}))
    assert not document.problems
    assert document.value == {"section": values}
    assert repr(document.value) == repr({"section": values})  # 1 and 1.0 and True are equal to ==
