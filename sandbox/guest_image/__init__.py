"""Builds what a VM boots, for `husk guest build`: kernel, initramfs, AppArmor policy. Build time only."""
