// Where things are in the guest. The host names the same paths (sandbox/plan.py).
#pragma once

#define GUEST_RUN "/run/husk"
#define GUEST_SHM GUEST_RUN "/shm"
#define GUEST_HUGE GUEST_RUN "/huge" // a hugetlbfs with a directory for each volume of huge pages
#define GUEST_MACHINE_ID GUEST_RUN "/machine-id"
#define GUEST_EMPTY GUEST_RUN "/empty" // a tmpfs of its own, read-only: what masked directories show
#define GUEST_FILES GUEST_RUN "/files" // files/<container id>/<n>: contents of Start.files
#define GUEST_CGROUP "/sys/fs/cgroup"
