"""Pods that share namespaces with the node: ordinary containers, by conmon and crun.

    engine      the verbs, behind the same seam as `vm_engine`
    steps       what such a pod and its containers hold of the host
    oci         a container's plan as an OCI configuration; pure
    conmon      the process that holds a container, and crun's commands
    control     what is limited, allowed and read in a container's cgroups, of v1 and of v2
    streams     pipes, terminals and sockets as the ends of sessions
    sessions    an exec, an attachment, a forwarded connection
    host_files  devices and volumes as they are on the host

Such a pod is a directory (the run directory of every pod) and a cgroup in each hierarchy:

    RUN/share/rootfs/ID      the root file system of a container
    RUN/containers/ID/       its bundle: config.json, what conmon writes (exit code, sockets), execs
    RUN/crun/                crun's state
    RUN/shm                  /dev/shm, unless the node's IPC is shared
    CGROUP/supervisor        the pod's first process, conmon of each container
    CGROUP/ID                a container

crun is told to leave cgroups alone: it knows no host whose v2 hierarchy has controllers beside v1, and
the files that a limit stands in are the same for all containers of Husk that way.

Crash story: conmon holds a container and writes its log and exit code without the daemon. Its identity
is in the container's record; a start that was cut short is known by its bundle, and undone. Killing all
that is in the pod's cgroups and removing its directory undoes everything at any moment.
"""
