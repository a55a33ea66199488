"""A page on which a picture is dropped: every task's prediction, and which experts each task used where.

Gradio makes it (the extra ``demo``). Nothing leaves this machine: no telemetry, the system's fonts, no page of another
host, and a policy with which the browser refuses any. Unless a host is asked for it listens on 127.0.0.1 and answers
only requests that name this machine. Pictures that were dropped are deleted when it ends.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from ase_dist.deployment.expert_maps import ExpertMaps, predict_with_experts, shares
from ase_dist.deployment.images import Pixels, to_rgb
from ase_dist.deployment.predictor import Predictor
from ase_dist.errors import UserError, describe
from ase_dist.pictures.heat import heat_over
from ase_dist.pictures.sheet import task_picture

LOGGER = logging.getLogger("ase_dist")
HOST = "127.0.0.1"
LARGEST_FILE = "64mb"
LONGEST_SIDE = 1024  # pixels of a picture on the page; predictions are made of the whole picture
BUTTONS = ["download", "fullscreen"]  # of Gradio's pictures; one of the others would publish them
ALL_LAYERS, MOST_USED = "mean of all layers", "the one that each task used most"
FONTS = ("system-ui", "sans-serif")
POLICY = (
    "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; object-src 'none'; base-uri 'self'; "
    "form-action 'self'; frame-ancestors 'none'"
)
Captioned = list[tuple[Image.Image, str]]


class Shown(NamedTuple):
    """What is kept of the last picture, for another choice of layer and expert."""

    image: Pixels
    maps: dict[str, ExpertMaps]


def prediction_pictures(model: Predictor, picture: Image.Image) -> tuple[Captioned, Image.Image | None, Shown]:
    """Each task's prediction under its title, the use of experts by layer (None without experts), what to keep.

    Raises UserError for a picture that cannot be used.
    """
    pixels = to_rgb(picture)
    prediction, maps = predict_with_experts(model, pixels)
    found = [(_small(task_picture(task, prediction[task.name]).convert("RGB")), task.title) for task in model.tasks]
    use = None
    if maps:
        from ase_dist.training.record.plots import draw_experts

        titles = [task.title for task in model.tasks if task.name in maps]
        use = draw_experts(shares(maps), titles=titles, num_shared=next(iter(maps.values())).num_shared)
    return found, use, Shown(np.asarray(_small(Image.fromarray(pixels))), maps)


def heat_maps(model: Predictor, shown: Shown, *, layer: int | None, expert: int | None) -> Captioned:
    """The gates of an expert over the picture for each task; ``expert`` None is the one that a task used most.

    All have one scale, up to the largest gate among them. ``layer`` None is the mean of all. Captions have the share of
    patches for which the expert was active, and its largest gate.
    """
    titles = {task.name: task.title for task in model.tasks}
    chosen: list[tuple[str, int, Any]] = []
    for name, maps in shown.maps.items():
        number = maps.most_used(layer) if expert is None else expert
        chosen.append((name, number, maps.gates(layer)[number]))
    top = max((float(map_hw.max()) for _, _, map_hw in chosen), default=0.0)
    found = []
    for name, number, map_hw in chosen:
        active = shown.maps[name].active[:, number]
        share = float(active.mean() if layer is None else active[layer])
        text = f"{titles[name]}: expert {expert_name(shown.maps[name], number)}, {share:.0%}"
        found.append((heat_over(shown.image, map_hw, top=top), f"{text}, gate to {float(map_hw.max()):.2f}"))
    return found


def expert_name(maps: ExpertMaps, number: int) -> str:
    """Its number, and whether it is a shared one."""
    return f"{number} (shared)" if number >= maps.mean_gates.shape[1] - maps.num_shared else str(number)


def _small(picture: Image.Image) -> Image.Image:
    """Within ``LONGEST_SIDE``; nearest, so that no class gets a colour in between."""
    scale = LONGEST_SIDE / max(picture.size)
    if scale >= 1:
        return picture
    return picture.resize(
        (max(1, round(picture.width * scale)), max(1, round(picture.height * scale))), Image.Resampling.NEAREST
    )


# ---------------------------------------------------------------------------------------------------------------------
# The page


def import_gradio() -> Any:
    """Gradio without telemetry; UserError where it is missing."""
    os.environ.update(GRADIO_ANALYTICS_ENABLED="False", HF_HUB_DISABLE_TELEMETRY="1", GRADIO_SHARE="False")
    try:
        import gradio
    except ImportError as error:
        raise UserError(
            f"demo: Gradio cannot be imported ({describe(error)}); install the extra: pip install 'ase-dist[demo]'"
        ) from None
    return gradio


def build_page(model: Predictor, *, title: str) -> Any:
    """Gradio's Blocks."""
    gr = import_gradio()
    moe = model.card.model.moe
    has_experts = moe.enabled
    experts = [str(i) for i in range(moe.num_experts - moe.num_shared)]
    experts += [f"{i} (shared)" for i in range(moe.num_experts - moe.num_shared, moe.num_experts)]

    def choices(layer: str, expert: str) -> dict[str, int | None]:
        return {
            "layer": None if layer == ALL_LAYERS else int(layer) - 1,
            "expert": None if expert == MOST_USED else int(expert.split(maxsplit=1)[0]),
        }

    def predict(picture: Image.Image | None, layer: str, expert: str) -> tuple[Any, ...]:
        if picture is None:
            return [], None, [], None
        try:
            found, use, shown = prediction_pictures(model, picture)
        except UserError as error:
            raise gr.Error(str(error)) from None
        return found, use, heat_maps(model, shown, **choices(layer, expert)), shown

    def choose(shown: Shown | None, layer: str, expert: str) -> Captioned:
        return [] if shown is None else heat_maps(model, shown, **choices(layer, expert))

    with gr.Blocks(title=title, analytics_enabled=False) as page:
        gr.Markdown(f"# {title}\n\n{_about(model)}")
        shown = gr.State()
        with gr.Row():
            picture = gr.Image(
                type="pil", image_mode=None, sources=["upload", "clipboard"], label="Drop a picture", elem_id="picture",
                height=460,
            )  # fmt: skip
            predictions = gr.Gallery(
                label="Predictions", columns=3, height=460, object_fit="contain", format="png", elem_id="predictions",
                interactive=False, buttons=BUTTONS,
            )  # fmt: skip
        with gr.Column(visible=has_experts):
            gr.Markdown(
                "## Experts\n\nWhere an expert acted for each task, and how strongly: its gate for each patch. "
                "Percentages are the shares of patches for which it was active."
            )
            with gr.Row():
                layer = gr.Dropdown([ALL_LAYERS, *map(str, range(1, _layers(model) + 1))], value=ALL_LAYERS,
                                    label="Layer", elem_id="layer")  # fmt: skip
                expert = gr.Dropdown([MOST_USED, *experts], value=MOST_USED, label="Expert", elem_id="expert")
            heat = gr.Gallery(
                label="Heat maps",
                columns=3,
                object_fit="contain",
                format="png",
                elem_id="heat",
                interactive=False,
                buttons=BUTTONS,
            )
            gr.Markdown("All experts, layer by layer:")
            use = gr.Image(
                show_label=False, type="pil", interactive=False, elem_id="use", format="png", buttons=BUTTONS
            )
        # ``api_name`` False: the page's own events are no interface for programs
        picture.change(predict, [picture, layer, expert], [predictions, use, heat, shown], api_name=False)
        for choice in (layer, expert):
            choice.change(choose, [shown, layer, expert], heat, api_name=False)
    return page


def _layers(model: Predictor) -> int:
    from ase_dist.moe import MoEFFN

    return sum(isinstance(module, MoEFFN) for module in model.modules())


def _about(model: Predictor) -> str:
    """The model in a line of Markdown."""
    settings, titles = model.card.model, ", ".join(task.title for task in model.tasks)
    words = [f"`{settings.backbone}`"]
    if settings.moe.enabled:
        moe = settings.moe
        words.append(f"experts {moe.num_experts}/{moe.k}/{moe.num_shared}/{moe.rank} (N/k/S/r)")
    return f"{', '.join(words)}. Tasks: {titles}. Everything is computed on this machine; nothing leaves it."


def serve(model: Predictor, *, title: str, host: str, port: int, ready: Callable[[str], None]) -> None:
    """Serve the page until Ctrl-C; ``ready`` is told its address. ``port`` 0 takes a free one.

    Raises UserError where Gradio is missing or the port cannot be had.
    """
    with tempfile.TemporaryDirectory(prefix="ase-dist-demo-") as folder, _listening(host, port) as listening:
        os.environ["GRADIO_TEMP_DIR"] = folder  # of the pictures that are dropped, and shown
        gr = import_gradio()
        import uvicorn
        from fastapi import FastAPI
        from starlette.middleware.trustedhost import TrustedHostMiddleware

        app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
        port = listening.getsockname()[1]
        app = gr.mount_gradio_app(
            app, build_page(model, title=title), "/", server_name=host, server_port=port, footer_links=[],
            run_history=False, show_error=True, max_file_size=LARGEST_FILE, ssr_mode=False, pwa=False, mcp_server=False,
            enable_monitoring=False, theme=gr.themes.Default(font=FONTS, font_mono=("ui-monospace", "monospace")),
        )  # fmt: skip

        app.add_middleware(_WithPolicy)
        if host == HOST:
            app.add_middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"])
        else:
            LOGGER.warning("whoever can reach %s can send pictures to this model; Ctrl-C ends it", host)

        class Server(uvicorn.Server):  # type: ignore[misc]
            async def startup(self, sockets: list[socket.socket] | None = None) -> None:
                await super().startup(sockets=sockets)
                ready(f"http://{host}:{port}/")

            async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
                logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # browsers that still listen are no error
                await super().shutdown(sockets=sockets)

        config = uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=1, lifespan="on")
        with contextlib.suppress(KeyboardInterrupt):  # which uvicorn raises once more when it has ended
            Server(config).run(sockets=[listening])
    LOGGER.info("the demo has ended")


class _WithPolicy:
    """The server ``app`` with the page's policy in every answer."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def send_with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                own = ((b"content-security-policy", POLICY.encode()), (b"x-content-type-options", b"nosniff"))
                message["headers"] = [*message.get("headers", ()), *own]
            await send(message)

        await self._app(scope, receive, send_with_policy if scope["type"] == "http" else send)


def _listening(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server((host, port))
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(
            f"--host, --port: cannot listen on port {port} of {host} ({reason}); name another, or port 0 for a free one"
        ) from None
