"""One sentence from pydantic's errors."""

from typing import Annotated, Literal

import pytest
from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError

from ase_dist.errors import UserError, first_problem

pytestmark = pytest.mark.single_gpu


def refuse(value: int) -> int:
    raise ValueError(f"Never {value}")


class Leaf(BaseModel):
    model_config = ConfigDict(extra="forbid")
    size: int = 1
    never: Annotated[int, AfterValidator(refuse)] = 0
    kind: Literal["auto"] | bool = "auto"
    by_name: dict[Literal["a", "b"], float] = {}


class Tree(BaseModel):
    leaves: list[Leaf]


@pytest.mark.parametrize(
    ("tree", "kind", "where", "got", "why"),
    [
        ({"leaves": [{}, {"size": "x"}]}, "int_parsing", "leaves.1.size", "x", "wanted a whole number"),
        ({"leaves": [{"sise": 1}]}, "extra_forbidden", "leaves.0.sise", 1, "extra inputs are not permitted"),
        ({"leaves": [{"never": 3}]}, "value_error", "leaves.0.never", 3, "Never 3"),
        ([], "model_type", "", [], "wanted names with values, such as {a: 1}"),
        ({"leaves": [{"kind": 3}]}, "literal_error", "leaves.0.kind", 3, "wanted 'auto' or true or false"),
        ({"leaves": [{"by_name": {"q": 1.0}}]}, "literal_error", "leaves.0.by_name.q", "q", "wanted 'a' or 'b'"),
    ],
)
def test_the_first_problem_is_named(tree, kind, where, got, why):
    with pytest.raises(ValidationError) as caught:
        Tree.model_validate(tree)
    problem = first_problem(caught.value)
    assert (problem.kind, problem.where, problem.got) == (kind, where, got)
    assert problem.why.startswith(why)


def test_a_sentence_that_quotes_a_lot_keeps_its_beginning_and_its_end():
    error = UserError(f"lists/train.txt: got the line {'9' * 100_000!r}, wanted a name; write one")
    assert len(str(error)) < 1600
    assert str(error).startswith("lists/train.txt: got the line") and str(error).endswith("wanted a name; write one")
    assert str(UserError("short")) == "short"
