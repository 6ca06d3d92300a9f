#include "credentials.h"

#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>

#include "buffer.h"
#include "scope.h"

#ifndef SO_PEERGROUPS
#define SO_PEERGROUPS 59
#endif

bool credentials_of_peer(int socket, struct credentials *credentials) {
    struct ucred peer;
    socklen_t size = sizeof peer;
    if (getsockopt(socket, SOL_SOCKET, SO_PEERCRED, &peer, &size) < 0)
        return false;
    *credentials = (struct credentials){.uid = peer.uid, .gid = peer.gid};
    autofree gid_t *groups = NULL;
    size = 0;
    // the first call fails and says how many there are
    if (getsockopt(socket, SOL_SOCKET, SO_PEERGROUPS, NULL, &size) == 0)
        return true;
    if (errno != ERANGE)
        return false;
    groups = memory_get(size);
    if (getsockopt(socket, SOL_SOCKET, SO_PEERGROUPS, groups, &size) < 0)
        return false;
    unsigned count = size / sizeof *groups;
    credentials->group_count = count < GROUPS_MAX ? count : GROUPS_MAX;
    memcpy(credentials->groups, groups, credentials->group_count * sizeof *groups);
    return true;
}

bool credentials_of_message(int socket, uid_t *uid, gid_t *gid) {
    union credentials_space space;
    char byte;
    struct iovec bytes = {.iov_base = &byte, .iov_len = 1};
    struct msghdr header = {
        .msg_iov = &bytes, .msg_iovlen = 1, .msg_control = &space, .msg_controllen = sizeof space};
    if (recvmsg(socket, &header, MSG_PEEK | MSG_DONTWAIT) < 0)
        return false;
    const struct cmsghdr *control = CMSG_FIRSTHDR(&header);
    if (!control || control->cmsg_level != SOL_SOCKET || control->cmsg_type != SCM_CREDENTIALS)
        return false;
    struct ucred sender;
    memcpy(&sender, CMSG_DATA(control), sizeof sender);
    *uid = sender.uid;
    *gid = sender.gid;
    return true;
}

bool socket_has_ended(int socket) {
    struct pollfd poll_one = {.fd = socket, .events = POLLRDHUP};
    return poll(&poll_one, 1, 0) == 1 && (poll_one.revents & (POLLRDHUP | POLLHUP | POLLERR));
}
