#include "protocol.h"

#undef errno

void failure_fill(Failure *failure, struct error *error) {
    husk__guest__v1__failure__init(failure);
    failure->step = error->step;
    failure->errno = error->number;
    failure->message = error->message;
}
