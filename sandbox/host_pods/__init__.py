"""Pods that share namespaces with the node: ordinary containers, by conmon and crun.

    engine      pods as a whole, and `make_engine`
    containers  starting, signalling and removing containers
    sessions    exec (`execs`), attach (`attach`) and port-forward, over `streams`
    control     limits, usage and facts
    steps       the resources of such a pod and of its containers
    layout      names of cgroups and directories
    cgroups     files of cgroups, of v1 and of v2
    oci         a container's plan as crun's configuration; pure
    conmon      command lines and files of conmon and crun
    host_files  devices and volumes as they are on the host
    network     running something in a pod's network namespace
    sysctls     which sysctls such a pod may set; pure

Such a pod is a directory (the run directory of every pod) and a cgroup in each hierarchy:

    RUN/share/rootfs/ID      the root filesystem of a container
    RUN/containers/ID/       its bundle: config.json, conmon's exit code and sockets, execs
    RUN/crun/                crun's state
    RUN/shm                  /dev/shm, unless the node's IPC is shared
    CGROUP/supervisor        the pod's first process, conmon of each container
    CGROUP/ID                a container

crun is started with cgroups disabled: it does not support hosts whose v2 hierarchy has controllers beside v1,
and this way Husk writes the limits of all its containers itself.

Crash story: conmon supervises a container and writes its log and exit code without the daemon. Its identity
is in the container's record; a start that was interrupted is known by its bundle, and undone. Killing all
that is in the pod's cgroups and removing its directory undoes everything at any moment.
"""
