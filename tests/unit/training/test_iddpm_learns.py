"""IDDPM and a transformer together learn: one clip by heart in some steps."""

from __future__ import annotations

import torch

from kinema.config.recipe import load_recipe
from kinema.diffusion.process import build_process
from kinema.models.build import build_transformer
from kinema.models.transformer import ClipShape
from kinema.training.config import TrainRecipe


def test_both_terms_of_the_loss_fall_on_one_clip() -> None:
    recipe = load_recipe("tiny/smoke-1.1", TrainRecipe)
    assert recipe.model is not None
    assert recipe.diffusion is not None
    generator = torch.Generator().manual_seed(0)
    model = build_transformer(recipe.model, generator)
    process = build_process(recipe.diffusion)
    x0 = torch.randn(1, 4, 5, 4, 4, generator=generator).expand(16, -1, -1, -1, -1)
    text = torch.randn(1, 1, 8, 16, generator=generator).expand(16, -1, -1, -1)
    whole = torch.ones(16)
    shape = ClipShape(fps=whole * 8, height=whole * 16, width=whole * 16, num_frames=whole * 5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    def terms(seed: int) -> dict[str, torch.Tensor]:
        draws = torch.Generator().manual_seed(seed)
        raw = process.draw(16, draws)
        t = process.training_timesteps(raw, latent_frames=5, height=16, width=16)
        noise = torch.randn(x0.shape, generator=draws)
        mask = torch.rand(16, 5, generator=draws) < 0.8
        prediction = model.predict(
            process.add_noise(x0, noise, t, mask),
            t,
            text,
            mask=torch.ones(16, 8, dtype=torch.bool),
            x_mask=mask,
            shape=shape,
        )
        found = process.loss_terms(prediction, x0, noise, t, mask=mask)
        return {name: value.mean() for name, value in found.items()}

    def measured() -> dict[str, float]:
        with torch.no_grad():
            found = [terms(seed) for seed in range(1000, 1008)]
        return {name: float(sum(one[name] for one in found)) / 8 for name in process.terms}

    before = measured()
    for step in range(120):
        optimizer.zero_grad()
        sum(terms(step).values()).backward()  # type: ignore[union-attr]
        optimizer.step()
    after = measured()
    assert after["mse"] < 0.6 * before["mse"], (before, after)
    assert after["vb"] < before["vb"], (before, after)
