"""Measures of a classifier: against scikit-learn and a slow definition, and at their limits."""

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score, confusion_matrix, log_loss, top_k_accuracy_score

from nextblock.errors import UsageError
from nextblock.evaluate.metrics import Tally


def some_logits(count=200, classes=7, seed=0):
    """Logits that tell the class more often than not, and labels of which the last class has none."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes - 1, (count,), generator=generator)
    logits = torch.randn(count, classes, generator=generator)
    logits[torch.arange(count), labels] += 1
    return logits, labels


def measured(logits, labels, batch_size=10_000, **settings):
    tally = Tally(logits.shape[1], **settings)
    for some, of_them in zip(logits.split(batch_size), labels.split(batch_size), strict=True):
        tally.add(some, of_them)
    tally.add(logits[:0], labels[:0])
    return tally.measures()


def slow_calibration_error(logits, labels, bins=15):
    """Guo et al. 2017, equation 3: bin m holds the confidences in ((m-1)/M, m/M]."""
    confidences, predictions = logits.double().softmax(dim=-1).max(dim=-1)
    error = 0.0
    for m in range(1, bins + 1):
        inside = [i for i in range(len(labels)) if (m - 1) / bins < confidences[i] <= m / bins]
        if inside:
            accuracy = sum(bool(predictions[i] == labels[i]) for i in inside) / len(inside)
            confidence = sum(float(confidences[i]) for i in inside) / len(inside)
            error += len(inside) / len(labels) * abs(accuracy - confidence)
    return error


@pytest.mark.parametrize(("seed", "batch_size"), [(0, 200), (1, 33), (2, 1)])
def test_measures_are_those_of_scikit_learn_and_of_the_slow_definition_however_batched(seed, batch_size):
    logits, labels = some_logits(seed=seed)
    logits *= 2
    found = measured(logits, labels, batch_size)
    truth, predicted, classes = labels.numpy(), logits.argmax(dim=-1).numpy(), np.arange(7)
    confusion = confusion_matrix(truth, predicted, labels=classes)
    assert found.images == 200
    assert np.array_equal(np.array(found.confusion), confusion)
    assert found.per_class == (*(confusion.diagonal() / confusion.sum(1).clip(1))[:6].tolist(), None)
    assert np.array_equal(found.right, truth == predicted)
    assert found.top1 == pytest.approx(float((truth == predicted).mean()))
    assert found.top5 == pytest.approx(top_k_accuracy_score(truth, logits.numpy(), k=5, labels=classes))
    # scikit-learn warns of classes that are predicted only: another wrong one stands for the last
    known = np.where(predicted == 6, (truth + 1) % 6, predicted)
    assert found.balanced == pytest.approx(balanced_accuracy_score(truth, known))
    loss = log_loss(truth, logits.double().softmax(dim=-1).numpy(), labels=classes)
    assert found.loss == pytest.approx(loss, rel=1e-5)
    assert found.calibration_error == pytest.approx(slow_calibration_error(logits, labels), abs=1e-6)
    assert found.calibration_error > 0.01


def test_sure_logits_have_no_loss_if_right_and_the_full_calibration_error_if_wrong():
    logits = torch.eye(4) * 1000
    right, wrong = measured(logits, torch.arange(4)), measured(logits, (torch.arange(4) + 1) % 4)
    assert (right.calibration_error, right.loss, right.top1) == (0, 0, 1)
    assert (wrong.calibration_error, wrong.top1, wrong.top5) == (1, 0, 1)  # five are all of four classes


def test_half_precision_is_summed_in_full():
    logits, labels = some_logits(count=3000)
    assert measured(logits.half(), labels).loss == pytest.approx(measured(logits, labels).loss, rel=1e-3)


def test_confusion_is_left_out_beyond_a_thousand_classes_or_unasked():
    logits, labels = some_logits(count=20)
    assert measured(logits, labels, confusion=False).confusion is None
    many = measured(torch.zeros(4, 1001), torch.arange(4))
    assert many.confusion is None
    assert len(many.per_class) == 1001


@pytest.mark.parametrize("odd", [math.nan, math.inf])
def test_logits_that_are_no_numbers_and_no_images_at_all_are_refused(odd):
    tally = Tally(4)
    with pytest.raises(UsageError, match="1 of 2 images have NaN logits: the head or the encoder diverged"):
        tally.add(torch.tensor([[0.0, 1, 2, odd], [0, 1, 2, 3]]), torch.tensor([0, 1]))
    with pytest.raises(UsageError, match="no image was measured"):
        tally.measures()
