// Paths in the guest. The host uses the same ones (sandbox/plan/).
#pragma once

#define GUEST_RUN "/run/husk"
#define GUEST_SHM GUEST_RUN "/shm"
#define GUEST_HUGE GUEST_RUN "/huge"       // a hugetlbfs with a directory for each volume of huge pages
#define GUEST_LIVE GUEST_RUN "/live"       // a tmpfs with copies of files of the host, see ChangeFiles
#define GUEST_SOCKETS GUEST_RUN "/sockets" // sockets that stand for the host's, see ListenSockets
#define GUEST_MACHINE_ID GUEST_RUN "/machine-id"
#define GUEST_EMPTY GUEST_RUN "/empty"            // a read-only tmpfs, bound over masked directories
#define GUEST_FILES GUEST_RUN "/files"            // files/<container id>/<n>: contents of Start.files
#define GUEST_MODULES GUEST_RUN "/rootfs/modules" // modules that the host offers, in its share
#define GUEST_CGROUP "/sys/fs/cgroup"
