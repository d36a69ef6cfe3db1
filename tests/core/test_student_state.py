"""The state s_t: scaling, running averages, and saving."""

from __future__ import annotations

import json
import math

import pytest
import torch

from l2t_core.errors import UserError
from l2t_core.students.state import (
    FEATURES,
    DevStatistics,
    StudentState,
    TrainStatistics,
    dev_statistics,
    feature_count,
    mean_prediction,
    train_statistics,
)


def test_features_by_hand():
    names = ("progress", "train_nll", "train_accuracy", "dev_nll", "dev_accuracy",
             "log_learning_rate", "class_accuracy")
    state = StudentState(100, 4, names)
    uniform = math.log(4)
    start = [-1, 0, -1, 0, -1, 1, -1, -1, -1, -1]
    assert state.features(0, 1.0).tolist() == pytest.approx(start)
    state.observe_train(TrainStatistics(uniform, 0.5))
    state.observe_train(TrainStatistics(0.0, 1.0))
    state.observe_dev(DevStatistics(uniform / 2, 0.75, (0.0, 0.5, 1.0, 1.0)))
    expected = [0, 2 * 0.95 / 2 - 1, 2 * 0.525 - 1, -0.5, 0.5, 0.0, -1, 0, 1, 1]
    assert state.features(50, 1e-3).tolist() == pytest.approx(expected, abs=1e-6)
    assert state.num_features == feature_count(names, 4) == 10


def test_many_classes_become_three_features():
    state = StudentState(10, 1000, ("class_accuracy",))
    state.observe_dev(DevStatistics(1.0, 0.5, (0.25, 0.5, 1.0, 0.25)))
    assert state.features(0, 1.0).tolist() == pytest.approx([-0.5, 0.0, 1.0])


def test_everything_stays_within_one():
    state = StudentState(10, 3, FEATURES)
    state.observe_train(TrainStatistics(1e9, 1.0))
    state.observe_dev(DevStatistics(1e9, 1.0, (1.0, 1.0, 1.0)))
    assert state.features(99, 1e-30).abs().max() <= 1
    before = state.features(5, 0.1)
    state.observe_train(TrainStatistics(math.nan, 0.5))
    state.observe_dev(DevStatistics(math.inf, 0.5))
    assert torch.equal(state.features(5, 0.1), before)


def test_state_survives_json():
    state = StudentState(10, 3, FEATURES)
    state.observe_train(TrainStatistics(0.3, 0.1))
    state.observe_dev(DevStatistics(0.7, 0.2, (0.1, 0.2, 0.3)))
    other = StudentState(10, 3, FEATURES)
    other.load_state_dict(json.loads(json.dumps(state.state_dict())))
    assert torch.equal(state.features(4, 0.1), other.features(4, 0.1))
    fresh = StudentState(10, 3, FEATURES)
    other.load_state_dict(json.loads(json.dumps(fresh.state_dict())))
    assert torch.equal(fresh.features(4, 0.1), other.features(4, 0.1))


def test_statistics_from_log_probs():
    probs = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.2, 0.7], [0.2, 0.5, 0.3]])
    targets = torch.tensor([0, 1, 1])
    train = train_statistics(probs.log(), targets)
    assert train.nll == pytest.approx(-math.log(0.5 * 0.2 * 0.5) / 3, rel=1e-6)
    assert train.accuracy == pytest.approx(2 / 3)
    dev = dev_statistics(probs.log(), targets, 3)
    assert dev.class_accuracy == pytest.approx((1.0, 0.5, 0.0))


def test_unknown_feature():
    with pytest.raises(UserError, match="did you mean 'progress'"):
        StudentState(10, 3, ("progres",))


def test_one_class_alone_is_refused():
    """Its log K, by which the nll is measured, is 0."""
    with pytest.raises(UserError, match="num_classes is 1; it must be 2 or more"):
        StudentState(10, 1, ("train_nll",))


def test_mean_prediction_is_that_of_each_class() -> None:
    probabilities = torch.tensor([[0.7, 0.2, 0.1], [0.5, 0.4, 0.1], [0.0, 0.25, 0.75]])
    found = mean_prediction(probabilities.log(), torch.tensor([0, 0, 2]), 3)
    expected = torch.tensor([[0.6, 0.3, 0.1], [0.0, 1.0, 0.0], [0.0, 0.25, 0.75]])
    assert found.dtype == torch.float64  # no example of class 1: it is taken for itself
    torch.testing.assert_close(found, expected.double(), atol=1e-7, rtol=0.0)
