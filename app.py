"""DynamicKV Explorer: `python app.py` here, and the entry point on Hugging Face Spaces."""

from __future__ import annotations

import argparse
import os

import dynamickv as dkv
from app.layout import build_app, launch_options
from app.model_host import ModelHost


def main() -> None:
    """Read the options, open the page; the model loads meanwhile."""
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
        "--model", default=dkv.DEFAULT_MODEL, help="short name, hub id, folder or .gguf file"
    )
    options = parser.parse_args()
    address = f"http://{options.host}:{options.port}"
    demo = build_app(ModelHost(options.model), url=address)
    demo.queue(max_size=24)
    print(f"DynamicKV Explorer: {address} (Ctrl+C ends it)", flush=True)
    demo.launch(server_name=options.host, server_port=options.port, quiet=True, **launch_options())


if __name__ == "__main__":
    main()
