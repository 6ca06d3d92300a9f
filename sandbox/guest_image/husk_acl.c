// SPDX-License-Identifier: MIT OR GPL-2.0-only
//
// A kernel module for the guest: ACLs of POSIX on submounts of virtio-fs.
//
// The VFS asks for the ACLs of a file only where its superblock has SB_POSIXACL. FUSE sets the flag on the
// superblock of a mount (fuse_fill_super_common), and forgets it on those of the submounts that virtiofsd
// announces (fuse_fill_super_submount), which have everything else from their parent. It is set here before
// anybody can see such a mount: when vfs_get_tree() returns it to the automount.

#include <linux/fs.h>
#include <linux/fs_context.h>
#include <linux/kprobes.h>
#include <linux/module.h>
#include <linux/string.h>

// Returns 1 where the return of the function does not matter.
static int begin(struct kretprobe_instance *call, struct pt_regs *registers) {
    struct fs_context *context = (struct fs_context *)regs_get_kernel_argument(registers, 0);
    if (context->purpose != FS_CONTEXT_FOR_SUBMOUNT || strcmp(context->fs_type->name, "virtiofs"))
        return 1;
    *(struct fs_context **)call->data = context;
    return 0;
}

static int end(struct kretprobe_instance *call, struct pt_regs *registers) {
    struct fs_context *context = *(struct fs_context **)call->data;
    if (regs_return_value(registers) == 0)
        context->root->d_sb->s_flags |= SB_POSIXACL;
    return 0;
}

static struct kretprobe probe = {
    .kp.symbol_name = "vfs_get_tree",
    .entry_handler = begin,
    .handler = end,
    .data_size = sizeof(struct fs_context *),
    .maxactive = 64, // calls at a time: one that is not probed would make a mount without ACLs
};

static int __init husk_acl_init(void) {
    return register_kretprobe(&probe);
}

module_init(husk_acl_init);
MODULE_DESCRIPTION("ACLs of POSIX on submounts of virtio-fs");
MODULE_LICENSE("Dual MIT/GPL");
