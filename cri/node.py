"""The runtime as a whole, as `Status` shows it: handlers, accelerator, versions, readiness.

A handler of the configuration names a kernel, or uses the image that `husk guest build` made. That image
is looked up at each start of a pod, so a new one is used without a restart.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path

import msgspec

from cri.config import Config
from cri.ports import Condition, Features
from cri.version import version
from sandbox.errors import MissingProgram, SandboxError
from sandbox.host.cgroup import Layout, find_driver
from sandbox.pods import find_handler
from sandbox.spec import Handler
from sandbox.vm_pods.accelerator import AcceleratorChoice, Prober
from sandbox.vm_pods.boot_image import GuestImage, find_image
from sandbox.vmm import EMULATION, Hypervisor
from sandbox.vmm.drivers import find_host

HOW_TO_BUILD = "husk guest build"


class HuskNode:
    """Handlers, accelerators and readiness of this node.

    `handlers` replaces those of the configuration, `choose_accelerator` the probe of
    `sandbox.vm_pods.accelerator`.
    """

    features = Features()  # replaced at start, after the filesystem was examined
    quarantined: Mapping[str, Mapping[str, str]] = {}  # reasons by kind and id; replaced at start

    def __init__(
        self,
        config: Config,
        hypervisor: Hypervisor,
        layout: Layout,
        *,
        handlers: Mapping[str, Handler] | None = None,
        choose_accelerator: Callable[[Handler], Awaitable[AcceleratorChoice]] | None = None,
    ) -> None:
        self._config = config
        self._choose = choose_accelerator
        self.cgroup_driver = find_driver(layout)
        self._hypervisor = hypervisor
        self._handlers = handlers if handlers is not None else config.runtime_handlers()
        self._choices: dict[tuple[str, str, str], AcceleratorChoice] = {}
        self._probing = asyncio.Lock()
        self._problem: str | None = None

    # ------------------------------------------------------------------------------ for pods

    def handler(self, name: str) -> Handler:
        """Return the handler of this name with kernel and initramfs filled in.

        Raises InvalidSpec for an unknown name, MissingProgram when no guest image was built.
        """
        handler = find_handler(self._handlers, name)
        if handler.kernel and handler.initramfs:
            return handler
        image = self._image()
        return msgspec.structs.replace(
            handler,
            kernel=handler.kernel or str(image.kernel),
            initramfs=handler.initramfs or str(image.initramfs),
        )

    async def accelerator(self, handler: Handler) -> AcceleratorChoice:
        """Choose the accelerator of this handler's VMs, once per hypervisor, setting and guest image.

        Raises MissingProgram, VmmError.
        """
        if self._choose is not None:
            return await self._choose(handler)
        image = self._image_of(handler)
        key = (handler.hypervisor, handler.accelerator, image.hash)
        async with self._probing:
            if key not in self._choices:
                self._choices[key] = await self._prober(handler.hypervisor).choose(handler.accelerator, image)
        return self._choices[key]

    def _prober(self, name: str) -> Prober:
        return Prober(name, find_host(name), self._hypervisor, Path(self._config.run))

    def _image(self) -> GuestImage:
        image = find_image(Path(self._config.root))
        if image is None:
            raise MissingProgram("the guest's kernel and initramfs", HOW_TO_BUILD)
        return image

    def _image_of(self, handler: Handler) -> GuestImage:
        """Return the image that a trial of an accelerator boots for this handler."""
        configured = handler.kernel + handler.initramfs
        made = find_image(Path(self._config.root))
        if made is not None and (not configured or handler.kernel == str(made.kernel)):
            return made
        return GuestImage(
            kernel=Path(handler.kernel),
            initramfs=Path(handler.initramfs),
            hash=configured,
            kernel_version="",
        )

    # ---------------------------------------------------------------------------- for Status

    def check(self) -> None:
        """Record whether the default handler has a kernel to boot. Reads files only; before serving."""
        try:
            self.handler("")
        except SandboxError as error:
            self._problem = str(error)

    async def warm_up(self) -> None:
        """Choose the default handler's accelerator in advance, and record what prevents it."""
        await self._default()

    async def _default(self) -> AcceleratorChoice | None:
        try:
            choice = await self.accelerator(self.handler(""))
        except SandboxError as error:
            self._problem = str(error)
            return None
        self._problem = None
        return choice

    def handlers(self) -> Sequence[str]:
        """Return the names of the configured handlers, "" (the default) first."""
        return list(self._handlers)

    def condition(self) -> Condition:
        """Return RuntimeReady: false with the reason when no VM can be started."""
        if self._problem is None:
            return Condition(ready=True)
        return Condition(ready=False, reason="CannotStartSandboxes", message=self._problem)

    async def describe(self) -> Mapping[str, object]:
        """Return versions, accelerator, guest image and the configuration in force."""
        default = await self._default()
        image = find_image(Path(self._config.root))
        return {
            "version": version(),
            "accelerator": default.accelerator if default else "",
            "emulated": default is not None and default.accelerator == EMULATION,
            "acceleratorReason": default.reason if default else self._problem,
            "guestKernel": image.kernel_version if image else "",
            "guestImage": image.hash if image else "",
            "quarantined": self.quarantined,
            "config": msgspec.to_builtins(self._config),
        }
