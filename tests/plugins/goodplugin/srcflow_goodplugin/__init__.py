"""Parts for srcflow from somebody else: an encoder, two couplings and a guidance rule."""
