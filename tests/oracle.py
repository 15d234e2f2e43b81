"""What the parity tests against torch share."""

import numpy as np
import torch


@torch.no_grad()
def randomise(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Every parameter drawn anew, norm gains and biases included; matrices keep the size of what passes through."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1:
            parameter.copy_(noise / parameter[0].numel() ** 0.5)
        else:
            centre = 3.0 if parameter.ndim == 0 else float(name.endswith("weight"))
            parameter.copy_(centre + 0.2 * noise)
    return model.eval()


def error(ours, theirs: torch.Tensor) -> float:
    """Largest difference over largest value."""
    theirs = theirs.detach().float().numpy()
    ours = np.asarray(ours, np.float32)
    assert ours.shape == theirs.shape
    return float(np.max(np.abs(ours - theirs)) / np.max(np.abs(theirs)))
