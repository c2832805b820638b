"""Whether W&B runs online: what is asked for, and whether this user is logged in."""

from collections.abc import Mapping
from configparser import ConfigParser
from configparser import Error as ConfigError
from netrc import NetrcParseError, netrc
from pathlib import Path
from typing import Literal, get_args
from urllib.parse import urlsplit

Mode = Literal["auto", "offline", "online", "disabled"]


def choose_mode(mode: Mode, env: Mapping[str, str]) -> str:
    """offline, online or disabled; auto takes WANDB_MODE if it is one of them, else online if logged in."""
    if mode not in get_args(Mode):
        raise ValueError(f"track.mode={mode} is unknown: take one of {', '.join(get_args(Mode))}")
    wanted = env.get("WANDB_MODE", "") if mode == "auto" else mode
    if wanted == "online" and not logged_in(env):
        where = "WANDB_MODE" if mode == "auto" else "track.mode"
        raise ValueError(f"{where}=online needs a login: run `wandb login`, or take track.mode=offline")
    if wanted in ("offline", "online", "disabled"):
        return wanted
    return "online" if logged_in(env) else "offline"


def logged_in(env: Mapping[str, str]) -> bool:
    """Whether wandb would find a key in `env`, the netrc file or its settings file. Touches no network."""
    if env.get("WANDB_API_KEY") or env.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    home = Path(env.get("HOME") or Path.home())
    host = urlsplit(env.get("WANDB_BASE_URL") or "https://api.wandb.ai").netloc
    files = [Path(env["NETRC"])] if env.get("NETRC") else [home / ".netrc", home / "_netrc"]
    for file in files:
        try:
            if netrc(file).hosts.get(host):
                return True
        except (OSError, NetrcParseError):
            # No file, or one that wandb could not use either.
            continue
    settings = ConfigParser(interpolation=None)
    try:
        settings.read(Path(env.get("WANDB_CONFIG_DIR") or home / ".config" / "wandb") / "settings")
    except ConfigError:
        return False
    return any(settings.get(part, "api_key", fallback="") for part in settings.sections())
