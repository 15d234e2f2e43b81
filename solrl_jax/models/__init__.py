"""Networks. Each name of MODELS is a file here with `make(cfg) -> Model` and `load(cfg, place)`."""

MODELS = ("flux", "sana", "sd35")
