"""The RuntimeDefault profile: what programs in containers need, and nothing that manages a kernel.

An allow list; any other call fails with EPERM, and one newer than the list with ENOSYS (see
`compiler`). It behaves as users of Docker, containerd and CRI-O expect: system calls that manage the
machine are allowed with the capability for them, and only then.

We maintain the lists: a new kernel's calls are added when they are harmless in a container. They include
calls of other architectures; libseccomp knows which exist where.
"""

from __future__ import annotations

from functools import cache

from sandbox.seccomp.profile import Action, Argument, Circumstances, Operator, Profile, Rule

EPERM = 1
ENOSYS = 38
AF_VSOCK = 40
# CLONE_NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET, NEWNS (sched(7), clone(2))
NAMESPACE_FLAGS = 0x7E02_0000
# PER_LINUX, PER_LINUX32, UNAME26 with either, and the query of the current one (personality(2))
PERSONALITIES = (0x0, 0x0008, 0x2_0000, 0x2_0008, 0xFFFF_FFFF)

_FILES = """
access chdir chmod chown chown32 close close_range copy_file_range creat dup dup2 dup3 faccessat
faccessat2 fadvise64 fadvise64_64 fallocate fchdir fchmod fchmodat fchmodat2 fchown fchown32 fchownat
fcntl fcntl64 fdatasync file_getattr file_setattr flock fstat fstat64 fstatat64 fstatfs fstatfs64
fsync ftruncate ftruncate64 futimesat getcwd getdents getdents64 ioctl lchown lchown32 link linkat
listmount _llseek lseek lstat lstat64 mkdir mkdirat mknod mknodat name_to_handle_at newfstatat open
openat openat2 pread64 preadv preadv2 pwrite64 pwritev pwritev2 read readahead readlink readlinkat
readv rename renameat renameat2 rmdir sendfile sendfile64 splice stat stat64 statfs statfs64 statmount
statx symlink symlinkat sync sync_file_range sync_file_range2 arm_sync_file_range arm_fadvise64_64
syncfs tee truncate truncate64 umask unlink unlinkat utime utimensat utimensat_time64 utimes vmsplice
write writev
"""
_ATTRIBUTES = """
fgetxattr flistxattr fremovexattr fsetxattr getxattr getxattrat lgetxattr listxattr listxattrat
llistxattr lremovexattr lsetxattr removexattr removexattrat setxattr setxattrat
"""
_WAITING = """
epoll_create epoll_create1 epoll_ctl epoll_ctl_old epoll_pwait epoll_pwait2 epoll_wait epoll_wait_old
eventfd eventfd2 fanotify_mark inotify_add_watch inotify_init inotify_init1 inotify_rm_watch
io_cancel io_destroy io_getevents io_pgetevents io_pgetevents_time64 io_setup io_submit _newselect
pause pipe pipe2 poll ppoll ppoll_time64 pselect6 pselect6_time64 select signalfd signalfd4
"""
_MEMORY = """
brk cachestat madvise map_shadow_stack membarrier memfd_create memfd_secret mincore mlock mlock2
mlockall mmap mmap2 mprotect mremap mseal msync munlock munlockall munmap pkey_alloc pkey_free
pkey_mprotect process_mrelease remap_file_pages
"""
_PROCESSES = """
alarm capget capset execve execveat exit exit_group fork get_robust_list get_thread_area getcpu
getitimer getpgid getpgrp getpid getppid getpriority getrlimit getrusage getsid gettid ioprio_get
ioprio_set kill landlock_add_rule landlock_create_ruleset landlock_restrict_self pidfd_open
pidfd_send_signal prctl prlimit64 restart_syscall rseq sched_get_priority_max sched_get_priority_min
sched_getaffinity sched_getattr sched_getparam sched_getscheduler sched_rr_get_interval
sched_rr_get_interval_time64 sched_setaffinity sched_setattr sched_setparam sched_setscheduler
sched_yield seccomp set_robust_list set_thread_area set_tid_address set_tls setitimer setpgid
setpriority setrlimit setsid sysinfo tgkill times tkill ugetrlimit uname vfork wait4 waitid waitpid
cacheflush breakpoint
"""
_SIGNALS = """
rt_sigaction rt_sigpending rt_sigprocmask rt_sigqueueinfo rt_sigreturn rt_sigsuspend rt_sigtimedwait
rt_sigtimedwait_time64 rt_tgsigqueueinfo sigaction sigaltstack signal sigpending sigprocmask sigreturn
sigsuspend
"""
_IDS = """
getegid getegid32 geteuid geteuid32 getgid getgid32 getgroups getgroups32 getresgid getresgid32
getresuid getresuid32 getuid getuid32 setfsgid setfsgid32 setfsuid setfsuid32 setgid setgid32
setgroups setgroups32 setregid setregid32 setresgid setresgid32 setresuid setresuid32 setreuid
setreuid32 setuid setuid32
"""
_TIME = """
adjtimex clock_adjtime clock_adjtime64 clock_getres clock_getres_time64 clock_gettime clock_gettime64
clock_nanosleep clock_nanosleep_time64 getrandom gettimeofday nanosleep time timer_create timer_delete
timer_getoverrun timer_gettime timer_gettime64 timer_settime timer_settime64 timerfd_create
timerfd_gettime timerfd_gettime64 timerfd_settime timerfd_settime64
"""
_SYNCHRONISING = """
futex futex_requeue futex_time64 futex_wait futex_waitv futex_wake ipc mq_getsetattr mq_notify mq_open
mq_timedreceive mq_timedreceive_time64 mq_timedsend mq_timedsend_time64 mq_unlink msgctl msgget msgrcv
msgsnd semctl semget semop semtimedop semtimedop_time64 shmat shmctl shmdt shmget
"""
_NETWORK = """
accept accept4 bind connect getpeername getsockname getsockopt listen recv recvfrom recvmmsg
recvmmsg_time64 recvmsg send sendmmsg sendmsg sendto setsockopt shutdown socketcall socketpair
"""
# of x86 only
_SEGMENTS = "arch_prctl modify_ldt"
# Debuggers may trace the container's processes; before Linux 4.8 a tracer could bypass this filter.
_TRACING = "process_vm_readv process_vm_writev ptrace"

# Calls that a capability allows in addition.
_MANAGING = {
    "CAP_BPF": "bpf",
    "CAP_DAC_READ_SEARCH": "open_by_handle_at",
    "CAP_PERFMON": "perf_event_open",
    "CAP_SYS_ADMIN": """
        bpf clone clone3 fanotify_init fsconfig fsmount fsopen fspick lookup_dcookie lsm_get_self_attr
        lsm_list_modules lsm_set_self_attr mount mount_setattr move_mount open_tree open_tree_attr
        perf_event_open quotactl quotactl_fd setdomainname sethostname setns syslog umount umount2 unshare
    """,
    "CAP_SYS_BOOT": "reboot",
    "CAP_SYS_CHROOT": "chroot",
    "CAP_SYS_MODULE": "delete_module finit_module init_module",
    "CAP_SYS_NICE": "get_mempolicy mbind set_mempolicy set_mempolicy_home_node",
    "CAP_SYS_PACCT": "acct",
    "CAP_SYS_PTRACE": "kcmp pidfd_getfd process_madvise process_vm_readv process_vm_writev ptrace",
    "CAP_SYS_RAWIO": "ioperm iopl",
    "CAP_SYS_TIME": "clock_settime clock_settime64 settimeofday stime",
    "CAP_SYS_TTY_CONFIG": "vhangup",
    "CAP_SYSLOG": "syslog",
}


@cache
def default_profile() -> Profile:
    """Return the RuntimeDefault profile."""
    everyone = (
        _FILES, _ATTRIBUTES, _WAITING, _MEMORY, _PROCESSES, _SIGNALS, _IDS, _TIME, _SYNCHRONISING, _NETWORK
    )  # fmt: skip
    names = tuple(sorted({name for group in everyone for name in group.split()}))
    return Profile(
        default_action=Action.ERRNO,
        default_errno_ret=EPERM,
        architectures=("SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"),
        syscalls=(
            _allow(names),
            _allow(_SEGMENTS.split(), includes=Circumstances(arches=("amd64", "x86", "x32"))),
            _allow(_TRACING.split(), includes=Circumstances(min_kernel="4.8")),
            *(
                _allow(("personality",), args=(Argument(index=0, value=value, op=Operator.EQ),))
                for value in PERSONALITIES
            ),
            # the guest's vsock, if any, is the agent's
            _allow(("socket",), args=(Argument(index=0, value=AF_VSOCK, op=Operator.NE),)),
            *_threads(),
            *(
                _allow(managed.split(), includes=Circumstances(caps=(capability,)))
                for capability, managed in sorted(_MANAGING.items())
            ),
        ),
    )


def _threads() -> tuple[Rule, Rule]:
    """Allow new threads and processes without new namespaces.

    The flags of clone3 are in memory, which a filter cannot read, so it fails with ENOSYS: C libraries
    then fall back to clone.
    """
    without = Circumstances(caps=("CAP_SYS_ADMIN",))
    same_namespaces = Argument(index=0, value=NAMESPACE_FLAGS, value_two=0, op=Operator.MASKED_EQ)
    return (
        _allow(("clone",), args=(same_namespaces,), excludes=without),
        Rule(names=("clone3",), action=Action.ERRNO, errno_ret=ENOSYS, excludes=without),
    )


def _allow(
    names: tuple[str, ...] | list[str],
    *,
    args: tuple[Argument, ...] | None = None,
    includes: Circumstances | None = None,
    excludes: Circumstances | None = None,
) -> Rule:
    return Rule(names=tuple(names), action=Action.ALLOW, args=args, includes=includes, excludes=excludes)
