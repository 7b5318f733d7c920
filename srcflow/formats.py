"""Published formats by name: what `srcflow convert` reads, and what `srcflow export` writes besides our own directories."""

from __future__ import annotations

KINDS = ("rae_decoder", "rae", "rae_diffusers", "encoder", "tarflow", "starflow")
"""What `convert` reads; each is a function of `srcflow.convert`."""
FLOWS = ("tarflow", "starflow")
"""Those of KINDS that are flows."""
FORMATS = (*FLOWS, "rae", "diffusers")
"""What `export --format` writes."""
