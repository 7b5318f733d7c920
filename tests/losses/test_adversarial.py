"""The adversarial loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from srcflow.errors import ConfigError
from srcflow.losses.adversarial import Adversarial, hinge_loss
from srcflow.losses.diffaug import DiffAug
from srcflow.registry import spec_of


@pytest.fixture
def adversarial(pyramid: Any) -> Adversarial:
    torch.manual_seed(0)
    loss = Adversarial(pyramid, layers=None, kernel=3)
    with torch.no_grad():
        for p in loss.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    return loss


def images(seed: int = 0, n: int = 3, size: int = 16) -> torch.Tensor:
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


def test_hinge_values() -> None:
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-2.0, 0.0])
    assert hinge_loss(real, fake).item() == pytest.approx(0.5 * ((0 + 0.5 + 2) / 3 + (0 + 1) / 2))


def test_losses_are_hinge_and_minus_mean(adversarial: Adversarial) -> None:
    adversarial.eval()  # no power iteration, so the logits can be asked for again
    real, fake = images(1), images(2)
    loss, logs = adversarial.discriminator_loss(real, fake)
    on_real, on_fake = adversarial.logits(real), adversarial.logits(fake)
    assert on_real.shape == (3, 8 * 8 + 4 * 4)
    torch.testing.assert_close(loss, hinge_loss(on_real, on_fake))
    torch.testing.assert_close(logs["logits_real"], on_real.mean())
    assert 0 <= logs["accuracy"] <= 1
    torch.testing.assert_close(adversarial.generator_loss(fake), -on_fake.mean())


def test_gradients_go_where_they_belong(adversarial: Adversarial) -> None:
    adversarial.train()
    fake = images(2).requires_grad_()
    state = {k: v.clone() for k, v in adversarial.state_dict().items()}
    adversarial.generator_loss(fake).backward()
    assert fake.grad is not None
    assert fake.grad.abs().sum() > 0
    assert all(p.grad is None for p in adversarial.parameters())
    assert all(torch.equal(v, state[k]) for k, v in adversarial.state_dict().items())  # no power iteration either
    assert adversarial.heads.training

    fake.grad = None
    adversarial.discriminator_loss(images(1), fake)[0].backward()
    assert fake.grad is None
    for name, p in adversarial.named_parameters():
        assert p.requires_grad
        assert p.grad is not None, name
        assert p.grad.abs().sum() > 0, name
    assert all(p.grad is None for p in adversarial.encoder.module.parameters())


def test_both_losses_in_one_training_step(adversarial: Adversarial) -> None:
    """The generator's graph survives the discriminator's forward pass and step."""
    adversarial.train()
    fake = images(2).requires_grad_()
    of_generator = adversarial.generator_loss(fake)
    optimizer = torch.optim.SGD(adversarial.parameters(), lr=0.1)
    of_discriminator, _ = adversarial.discriminator_loss(images(1), fake)
    of_generator.backward()
    of_discriminator.backward()
    optimizer.step()


def test_discriminator_learns_to_tell_apart(adversarial: Adversarial) -> None:
    adversarial.train()
    optimizer = torch.optim.Adam(adversarial.parameters(), lr=2e-3)
    for step in range(60):
        real, fake = images(step, 16) * 0.5 + 0.5, images(1000 + step, 16) * 0.5
        loss, logs = adversarial.discriminator_loss(real, fake)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.5
    assert logs["accuracy"] > 0.9
    assert logs["logits_real"] > logs["logits_fake"]


def test_spectral_norm_bounds_the_convolutions(adversarial: Adversarial) -> None:
    adversarial.train()
    for _ in range(30):
        adversarial.logits(images())
    for module in adversarial.heads.modules():
        if isinstance(module, nn.Conv1d):
            assert torch.linalg.matrix_norm(module.weight.flatten(1), 2).item() == pytest.approx(1, abs=0.02)


def test_logits_do_not_depend_on_the_batch(adversarial: Adversarial) -> None:
    adversarial.eval()
    x = images(n=4)
    torch.testing.assert_close(adversarial.logits(x)[:1], adversarial.logits(x[:1]), rtol=1e-4, atol=1e-5)


def test_adaptive_weight_is_the_ratio_of_gradient_norms(adversarial: Adversarial) -> None:
    w = torch.tensor([3.0, 4.0], requires_grad=True)
    reconstruction, judged = (w * torch.tensor([6.0, 8.0])).sum(), (w * torch.tensor([0.3, 0.4])).sum()
    value = adversarial.adaptive_weight(reconstruction, judged, w)
    assert value.item() == pytest.approx(0.75 * 10 / (0.5 + 1e-4))
    assert not value.requires_grad
    assert w.grad is None
    (reconstruction + value * judged).backward()  # the graphs are still there
    capped = adversarial.adaptive_weight((w * 1e6).sum(), (w * 0).sum(), w)
    assert capped.item() == pytest.approx(0.75e4)
    # float64 stays, half precision is lifted
    w64 = w.detach().double().requires_grad_()
    assert adversarial.adaptive_weight(w64.sum(), w64.sum(), w64).dtype == torch.float64
    w16 = w.detach().bfloat16().requires_grad_()
    assert adversarial.adaptive_weight(w16.sum(), w16.sum(), w16).dtype == torch.float32


def test_weight_zero_asks_for_no_gradient(pyramid: Any) -> None:
    loss = Adversarial(pyramid, layers=[0], weight=0)
    no_graph = torch.tensor(1.0)
    assert loss.adaptive_weight(no_graph, no_graph, no_graph).item() == 0


def test_checkpoints_hold_the_heads_only(adversarial: Adversarial) -> None:
    assert all(k.startswith("heads.") for k in adversarial.state_dict())
    assert all(n.startswith("heads.") for n, _ in adversarial.named_parameters())


def test_augmentation_is_keyed(pyramid: Any) -> None:
    loss = Adversarial(pyramid, layers=None, augment=DiffAug()).eval()
    x = images()
    first = loss.generator_loss(x, generator=torch.Generator().manual_seed(1))
    assert torch.equal(first, loss.generator_loss(x, generator=torch.Generator().manual_seed(1)))
    assert not torch.equal(first, loss.generator_loss(x, generator=torch.Generator().manual_seed(2)))
    assert spec_of(loss)["init_args"]["augment"]["class_path"].endswith("DiffAug")


def test_setup_loads_the_encoder(adversarial: Adversarial) -> None:
    adversarial.setup()
    assert adversarial.encoder.module.loaded  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        ({"kernel": 4}, "adversarial.kernel"),
        ({"weight": -1.0}, "adversarial.weight"),
        ({"train_from": 10, "count_from": 5}, "adversarial.count_from"),
        ({"layers": [7]}, "adversarial.layers"),
        ({"layers": []}, "adversarial.layers"),
    ],
)
def test_bad_values_are_named(pyramid: Any, arguments: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError, match=key.replace(".", r"\.")):
        Adversarial(pyramid, **{"layers": None, **arguments})


def test_on_a_vision_transformer() -> None:
    from srcflow.encoders.timm_vit import TimmViT

    small = {"depth": 4, "embed_dim": 32, "num_heads": 2}
    encoder = TimmViT("vit_small_patch8_224.dino", image_size=32, weights=None, timm_args=small)
    loss = Adversarial(encoder, layers=[1, 3])
    fake = images(size=32).requires_grad_()
    assert loss.logits(fake).shape == (3, 2 * 16)
    loss.generator_loss(fake).backward()
    assert fake.grad is not None
    assert fake.grad.abs().sum() > 0
