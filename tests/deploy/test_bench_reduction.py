"""The accuracy of reduced pictures is measured as the evaluation measures that of whole ones."""

from common.config import TokenReduction
from deploy.bench.reduction import Outcome, accuracy, ask_all
from deploy.shapes import CHECKPOINT
from deploy.shapes.evaluate import Answerer, sample_cases, through_file


def test_with_all_tokens_kept_an_answer_is_right_where_the_evaluation_says_so() -> None:
    cases = [case for case in sample_cases(5, 2) if case.form in ("image", "images")][::3]
    outcomes = ask_all(CHECKPOINT, cases, [None, TokenReduction(method="random", ratio=0.02)])
    answerer = Answerer(CHECKPOINT)
    for case, outcome in zip(cases, outcomes[::2], strict=True):
        images = [through_file(scene) for scene in case.pictures]
        inputs = answerer.inputs(images, case.form, case.question.text, case.text_first)
        assert outcome.right == answerer.would_answer(inputs, case.question.answer)
    assert sum(outcome.right for outcome in outcomes[::2]) > sum(outcome.right for outcome in outcomes[1::2])


def test_accuracy_is_of_each_category_and_of_all() -> None:
    outcomes = [Outcome("colour", None, True), Outcome("colour", None, False), Outcome("size", None, True)]
    assert accuracy(outcomes) == {"all": 2 / 3, "colour": 0.5, "size": 1.0}
