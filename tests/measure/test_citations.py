"""Citations: which row a figure cites, how it is written, and what is refused."""

import pytest

from citations import Results, fill
from llmfast.errors import UserError
from llmfast.measure.results import write


@pytest.fixture
def results(tmp_path, make_run, make_row, copy_row):
    gb = make_row(2700.0, metric="gb_per_s", unit="GB/s")
    write(tmp_path / "h100/norm.json", (make_run(make_row(10.0), gb, copy_row),))
    rate = {"unit": "tok/s", "metric": "tok_per_s"}
    share = {"unit": "1", "metric": "roofline_share"}
    rows = [make_row(15673.4, case="batch=128", **rate), make_row(1.82, case="batch=128", **share)]
    write(tmp_path / "h100/decode.json", (make_run(*rows),))
    return Results(tmp_path)


@pytest.mark.parametrize(
    ("words", "figure"),
    [
        ("h100/norm op=rms_norm tokens=1 llmfast us", "10.00"),
        ("h100/norm tokens=1 op=rms_norm llmfast us .0f", "10"),  # the case in any order
        ("h100/norm tokens=1 op=rms_norm llmfast us.low", "9.000"),
        ("h100/norm tokens=1 op=rms_norm llmfast us.high .1f", "11.0"),
        ("h100/norm tokens=1 op=rms_norm llmfast gb_per_s.of_copy", "90%"),
        ("h100/decode batch=128 llmfast tok_per_s", "15,673"),
        ("h100/decode batch=128\nllmfast tok_per_s", "15,673"),
        ("h100/decode batch=128 llmfast roofline_share", "182%"),
        ("h100/decode batch=128 llmfast roofline_share .2f", "1.82"),
    ],
)
def test_a_figure_is_the_row_s(results, words, figure):
    page = f"| 1 | <!-- row {words} --><!-- /row --> |"
    filled, stale = fill(page, results, "page.md")
    assert filled == f"| 1 | <!-- row {words} -->{figure}<!-- /row --> |"
    assert stale == [f"page.md:1: shows '', the row has {figure!r}"]
    assert fill(filled, results, "page.md") == (filled, [])


def test_several_figures_of_a_line(results):
    cited = "<!-- row h100/decode batch=128 llmfast tok_per_s -->{}<!-- /row -->"
    page = f"\n{cited.format('1')} and {cited.format('15,673')} and {cited.format('x')}"
    filled, stale = fill(page, results, "page.md")
    assert filled == f"\n{' and '.join([cited.format('15,673')] * 3)}"
    assert [line.split(",")[0] for line in stale] == [
        "page.md:2: shows '1'",
        "page.md:2: shows 'x'",
    ]


@pytest.mark.parametrize(
    ("page", "words"),
    [
        ("<!-- row h100/norm tokens=1 llmfast us -->1<!-- /row -->", "has no row of llmfast, us"),
        ("<!-- row h100/norm op=rms_norm tokens=1 eager us -->1<!-- /row -->", "no row of eager"),
        ("<!-- row h200/norm tokens=1 llmfast us -->1<!-- /row -->", "cannot be read"),
        ("<!-- row h100/norm tokens=1 us -->1<!-- /row -->", "a citation is FILE"),
        ("<!-- row h100/norm tokens=1 llmfast us -->1", "without its pair"),
        ("1<!-- /row -->", "without its pair"),
        ("<!-- row h100/norm a=b|c llmfast us -->1<!-- /row -->", "must not contain"),
        ("<!-- row h100/decode batch=128 llmfast tok_per_s !! -->1<!-- /row -->", "no format"),
        ("<!-- row h100/decode batch=128 llmfast tok_per_s.of_copy -->1<!-- /row -->", "of_copy"),
    ],
)
def test_a_bad_citation_is_refused_by_page(results, page, words):
    with pytest.raises(UserError, match=r"page\.md") as caught:
        fill(page, results, "page.md")
    assert words in str(caught.value)
