// Who is at the other end of a Unix socket (unix(7)).
#pragma once

#include <stdbool.h>
#include <sys/socket.h>
#include <sys/types.h>

enum { GROUPS_MAX = 64 };

struct credentials {
    uid_t uid;
    gid_t gid;
    gid_t groups[GROUPS_MAX];
    unsigned group_count; // those beyond GROUPS_MAX are left out
};

union credentials_space {
    struct cmsghdr header;
    char space[CMSG_SPACE(sizeof(struct ucred))];
};

// Of the process that connected; false: they are not known.
bool credentials_of_peer(int socket, struct credentials *credentials);

// Of the sender of the next message of a socket with SO_PASSCRED; false: there is no message.
bool credentials_of_message(int socket, uid_t *uid, gid_t *gid);

// Whether the other end sends nothing more.
bool socket_has_ended(int socket);
