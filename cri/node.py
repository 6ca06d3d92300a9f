"""The runtime as a whole, as `Status` shows it: handlers, accelerator, versions, readiness.

A handler of the configuration names a kernel or leaves it to the image that `husk guest build` made;
which one that is, is looked up at each start of a pod, so a new image is used without a restart.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from cri.config import Config
from cri.ports import Condition, Features
from cri.version import version
from sandbox.errors import MissingProgram, SandboxError
from sandbox.guest_image.build import GuestImage, find_image
from sandbox.host.cgroup import Layout, find_driver
from sandbox.pods import find_handler
from sandbox.spec import Handler
from sandbox.vm_pods.accelerator import AcceleratorChoice, choose
from sandbox.vmm import Hypervisor

HOW_TO_BUILD = "husk guest build"


class HuskNode:
    features = Features()  # set anew once the disk was tried

    def __init__(self, config: Config, hypervisor: Hypervisor, layout: Layout) -> None:
        self._config = config
        self.cgroup_driver = find_driver(layout)
        self._hypervisor = hypervisor
        self._handlers = config.runtime_handlers()
        self._verdicts: dict[tuple[str, str], AcceleratorChoice] = {}
        self._probing = asyncio.Lock()
        self._problem: str | None = None

    # ------------------------------------------------------------------------------ for pods

    def handler(self, name: str) -> Handler:
        """With its kernel filled in. Raises InvalidSpec, MissingProgram."""
        handler = find_handler(self._handlers, name)
        if handler.kernel and handler.initramfs:
            return handler
        image = self._image()
        return msgspec.structs.replace(
            handler,
            kernel=handler.kernel or str(image.kernel),
            initramfs=handler.initramfs or str(image.initramfs),
        )

    async def verdict(self, handler: Handler) -> AcceleratorChoice:
        """KVM or TCG for this handler's VMs; probed once. Raises MissingProgram."""
        image = self._image_of(handler)
        key = (handler.accelerator, image.hash)
        async with self._probing:
            if key not in self._verdicts:
                self._verdicts[key] = await choose(
                    handler.accelerator, image, self._hypervisor, Path(self._config.run)
                )
        return self._verdicts[key]

    def _image(self) -> GuestImage:
        image = find_image(Path(self._config.root))
        if image is None:
            raise MissingProgram("the guest's kernel and initramfs", HOW_TO_BUILD)
        return image

    def _image_of(self, handler: Handler) -> GuestImage:
        """What a probe would boot."""
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
        """Whether the default handler has a kernel to boot; quick, before the first client asks."""
        try:
            self.handler("")
        except SandboxError as error:
            self._problem = str(error)

    async def warm_up(self) -> None:
        """Choose the default handler's accelerator before a client has to wait for it."""
        try:
            await self.verdict(self.handler(""))
        except SandboxError as error:
            self._problem = str(error)
        else:
            self._problem = None

    def handlers(self) -> Sequence[str]:
        return list(self._handlers)

    def condition(self) -> Condition:
        if self._problem is None:
            return Condition(ready=True)
        return Condition(ready=False, reason="CannotStartSandboxes", message=self._problem)

    async def describe(self) -> Mapping[str, object]:
        await self.warm_up()
        default = next(iter(self._verdicts.values()), None)
        image = find_image(Path(self._config.root))
        return {
            "version": version(),
            "accelerator": default.accelerator if default else "",
            "acceleratorReason": default.reason if default else self._problem,
            "guestKernel": image.kernel_version if image else "",
            "guestImage": image.hash if image else "",
            "config": msgspec.to_builtins(self._config),
        }
