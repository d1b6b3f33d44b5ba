"""Boxes as a tensor: padding, areas, intersections by hand."""

from __future__ import annotations

import torch

from rarefy.data.boxes import boxes


def test_pictures_are_padded_to_the_most_boxes_and_to_one_row_at_least() -> None:
    one = torch.tensor([[0.0, 0, 2, 2, 3, 0.5]])
    batch = boxes.padded([one, torch.zeros(0, 6), one.repeat(3, 1)], boxes.FOUND_COLUMNS)
    assert batch.shape == (3, 3, 6)
    assert boxes.present(batch).tolist() == [[True, False, False], [False] * 3, [True] * 3]
    assert boxes.padded([torch.zeros(0, 8)], boxes.TARGET_COLUMNS).shape == (1, 1, 8)
    assert boxes.padded([], boxes.TARGET_COLUMNS).shape == (0, 1, 8)


def test_intersection_over_union_by_hand() -> None:
    a = torch.tensor([[0.0, 0, 4, 4], [5, 5, 5, 9], [3, 3, 1, 1]])
    b = torch.tensor([[2.0, 2, 6, 6], [0, 0, 4, 4]])
    assert boxes.area(a).tolist() == [16, 0, 0]
    assert torch.allclose(boxes.iou(a, b), torch.tensor([[4 / 28, 1.0], [0, 0], [0, 0]]))
    assert boxes.iou(a[1:2], a[1:2]).item() == 0


def test_it_does_not_change_when_a_side_is_scaled_and_the_picture_is_shifted() -> None:
    a, b = torch.rand(2, 5, 4), torch.rand(2, 7, 4)
    a[..., 2:] += a[..., :2]
    b[..., 2:] += b[..., :2]
    scale, shift = torch.tensor([3.0, 0.5, 3.0, 0.5]), torch.tensor([7.0, -2, 7, -2])
    assert torch.allclose(boxes.iou(a * scale + shift, b * scale + shift), boxes.iou(a, b), atol=1e-5)
