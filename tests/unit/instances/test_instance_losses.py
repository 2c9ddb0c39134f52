"""The loss of the instance decoder: what it looks at, and what it leaves alone."""

import numpy as np
import pytest
import torch

from samray.geometry.masks import CroppedMask
from samray.instances.decoder import Maps
from samray.instances.losses import TargetMaps, instance_loss
from samray.instances.targets import map_targets, number_objects

SIZE = (32, 32)


def targets(ignored=None):
    """Two squares of the classes 0 and 1 on a grid of a cell a pixel."""
    masks = [CroppedMask(np.ones((9, 9), bool), place) for place in ((2, 2), (20, 20))]
    return TargetMaps.of([map_targets(number_objects(masks, SIZE, ignored), [0, 1], 32)])


def maps(of, num_classes=2, sure=8.0):
    """What a decoder without any error would say."""
    kinds = torch.nn.functional.one_hot(of.classes, num_classes).permute(0, 3, 1, 2).float()
    foreground = sure * (2 * of.foreground - 1)
    return Maps(foreground, of.center.clone(), of.boundary.clone(), sure * kinds[:, :, ::2, ::2])


def test_maps_without_an_error_cost_nearly_nothing_and_any_error_more():
    right = targets()
    best = instance_loss(maps(right), right)
    assert best.shape == (1,)
    assert best.item() < 0.01
    for name in ("foreground", "center", "boundary", "classes"):
        wrong = maps(right)
        value = getattr(wrong, name)
        value[..., :16, :16] = 1 - value[..., :16, :16]
        assert instance_loss(wrong, right).item() > best.item() + 0.02


def test_one_label_alone_is_no_question():
    right = targets()
    right.classes.zero_()
    one = maps(right, num_classes=1)
    one.classes.fill_(-5.0)
    assert instance_loss(one, right).item() < 0.01


def test_an_image_without_objects_or_without_a_known_cell_has_a_finite_loss():
    empty = TargetMaps.of([map_targets(number_objects([], SIZE), [], 32)])
    assert instance_loss(maps(empty, sure=20.0), empty).item() < 0.01
    unknown = TargetMaps.of([map_targets(number_objects([], SIZE, np.ones(SIZE, bool)), [], 32)])
    said = maps(empty)
    said.foreground.requires_grad_()
    loss = instance_loss(said, unknown)
    loss.sum().backward()
    assert loss.item() == pytest.approx(0)
    assert not said.foreground.grad.any()


def test_an_ignored_region_has_no_gradient():
    ignored = np.zeros(SIZE, bool)
    ignored[:, 16:] = True
    wanted = targets(ignored)
    said = maps(wanted, sure=0.5)
    said.foreground.requires_grad_()
    instance_loss(said, wanted).sum().backward()
    moved = said.foreground.grad[0] != 0
    known = wanted.known[0] > 0
    assert not moved[~known].any()
    assert moved[known].all()
    assert (~known).sum() == 32 * 16 - 81  # the object in it is learned
