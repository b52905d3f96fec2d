"""DynamicKV Explorer: `python app.py` here, and the entry point on Hugging Face Spaces."""

from __future__ import annotations

import argparse
import ipaddress
import os
import sys
from pathlib import Path

import app.threads  # noqa: F401  (before torch)
import dynamickv as dkv
from app.page import MAX_EVENTS, build_app, launch_options
from app.serving.logs import LEVELS, set_up
from app.serving.model_host import ModelHost
from app.serving.shelf import PREFILL_BYTES, Shelf
from app.serving.turns import Turns
from app.serving.zero_gpu import is_zero_gpu


def main() -> None:
    """Read the options, open the page; the model loads meanwhile."""
    options = read_options()
    set_up(options.log_level)
    if "SPACE_ID" in os.environ:
        # A Space is reached through its proxy only: the visitor's address is in its header.
        os.environ.setdefault("FORWARDED_ALLOW_IPS", "*")
    host, turns = ModelHost(options.model, allow_any=options.allow_any_model), Turns()
    if is_zero_gpu():
        host.load_default()  # before any process is forked for a GPU
    address = f"http://{options.host}:{options.port}"
    kept = options.keep * 2**20
    shelf = Shelf(kept, max(kept // 8, 2**20))
    demo = build_app(host, url=address, turns=turns, shelf=shelf)
    demo.queue(max_size=MAX_EVENTS)
    try:
        demo.launch(
            server_name=options.host,
            server_port=options.port,
            quiet=True,
            auth=options.auth,
            prevent_thread_lock=True,
            **launch_options(host, turns),
        )
    except OSError as error:
        if "empty port" not in str(error):
            raise
        print(f"error: port {options.port} is in use; choose another with --port", file=sys.stderr)
        sys.exit(2)
    print(f"DynamicKV Explorer: {address} (Ctrl+C ends it)", flush=True)
    demo.block_thread()


def read_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="See what KV-cache compression keeps of your own text."
    )
    parser.add_argument(
        "--host",
        # Spaces say with it that the page must be reachable from outside its container.
        default=os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1"),
        help="address to listen on (default: this machine only)",
    )
    parser.add_argument("--port", type=int, default=7860, help="port (default: 7860)")
    parser.add_argument(
        "--model",
        default=dkv.DEFAULT_MODEL,
        help="short name, hub id, folder or .gguf file; none: the recorded runs alone",
    )
    parser.add_argument(
        "--auth",
        type=credentials,
        default=os.environ.get("DYNAMICKV_AUTH"),
        metavar="USER:PASSWORD",
        help="ask visitors for these; or set DYNAMICKV_AUTH, which other users' ps does not show",
    )
    parser.add_argument(
        "--allow-any-model",
        action="store_true",
        help="let the page load any hub id, folder or file; only on an address of this machine",
    )
    parser.add_argument(
        "--keep",
        type=int,
        default=PREFILL_BYTES // 2**20,
        metavar="MIB",
        help="memory for prompts that visitors may ask what-if about (default: 2048)",
    )
    parser.add_argument("--log-level", choices=LEVELS, default="info", help="(default: info)")
    options = parser.parse_args()
    if not 0 <= options.port <= 65535:
        parser.error(f"--port must be from 0 to 65535, got {options.port}")
    if options.keep < 0:
        parser.error(f"--keep must be at least 0 MiB, got {options.keep}")
    if not may_be_a_model(options.model):
        parser.error(
            f"--model: there is no model {options.model!r}; give one of "
            f"{', '.join(dkv.KNOWN_MODELS)}, a hub id (organisation/model), a folder with "
            "safetensors or a .gguf file"
        )
    if options.allow_any_model and not is_loopback(options.host):
        parser.error(
            f"--allow-any-model would let strangers at {options.host} load what they like: "
            "leave out --host or --allow-any-model"
        )
    return options


def credentials(text: str) -> tuple[str, str]:
    """User and password."""
    user, colon, password = text.partition(":")
    if not user or not colon or not password:
        raise argparse.ArgumentTypeError("give it as USER:PASSWORD")
    return user, password


def may_be_a_model(name: str) -> bool:
    """Whether there is something to load by that name, as far as is known without the hub."""
    known = name.lower() in dkv.KNOWN_MODELS or Path(name).expanduser().exists()
    return known or "/" in name or name == "none"


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches that address."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


if __name__ == "__main__":
    main()
