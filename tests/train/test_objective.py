"""The loss of a stage: labels, a teacher, mixed images."""

import pytest
import torch

from iirsnn.models import vgg
from iirsnn.train.objective import Objective
from iirsnn.train.recipe import StageConfig


def test_an_objective_is_the_labels_loss_and_the_teachers():
    torch.manual_seed(0)
    teacher = vgg([4], 3, (1, 4, 4), hidden=[8], batch_norm=True)
    config = StageConfig(label_smoothing=0.1, teacher_weight=0.3, teacher_temperature=4.0)
    images, labels, logits = (
        torch.randn(5, 1, 4, 4),
        torch.tensor([0, 1, 2, 0, 1]),
        torch.randn(5, 3),
    )
    loss = Objective(config, 3, teacher).loss(logits, images, labels)
    soft = (teacher.eval()(images).detach() / 4).softmax(1)
    distance = -(soft * (logits / 4).log_softmax(1)).sum(1).mean() * 16
    hard = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.1)
    assert loss.item() == pytest.approx((0.7 * hard + 0.3 * distance).item())
    assert not any(p.requires_grad for p in teacher.parameters())
    assert Objective(config, 3).loss(logits, images, labels).item() == pytest.approx(hard.item())


def test_mixup_mixes_images_as_it_mixes_labels():
    torch.manual_seed(0)
    objective = Objective(StageConfig(mixup=1.0), 3)
    labels = torch.tensor([0, 1, 2, 0])
    images = torch.nn.functional.one_hot(labels, 4).float().view(4, 1, 2, 2)  # show their label
    mixed, targets = objective.targets(images, labels)
    assert torch.allclose(mixed.flatten(1)[:, :3], targets)
    assert ((targets > 0) & (targets < 1)).any()
    plain = Objective(StageConfig(), 3).targets(images, labels)
    assert plain[0] is images
    assert plain[1] is labels
