"""Networks. Each name of MODELS is a file here with `make(cfg) -> Model` and `load(cfg, place, place_vae)`."""

MODELS = ("flux", "flux2", "sana", "sd35", "zimage")
