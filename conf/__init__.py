"""The configuration: this package lets Hydra find the yaml groups as `pkg://longspan.conf`."""
