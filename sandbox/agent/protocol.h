// The generated messages, under short names. A field of Failure is named errno, like the macro.
#pragma once

#include <stdbool.h>
#include <stdint.h>

#pragma push_macro("errno")
#undef errno
#include "guest.pb-c.h"
#pragma pop_macro("errno")

#include "error.h"

// The range of protocol versions that this agent speaks.
enum { PROTOCOL_MIN = 2, PROTOCOL_MAX = 2 };

typedef Husk__Guest__V1__Hello Hello;
typedef Husk__Guest__V1__Welcome Welcome;
typedef Husk__Guest__V1__BootPhase BootPhase;
typedef Husk__Guest__V1__ContainerState ContainerState;
typedef Husk__Guest__V1__Request Request;
typedef Husk__Guest__V1__Reply Reply;
typedef Husk__Guest__V1__Failure Failure;
typedef Husk__Guest__V1__Prepare Prepare;
typedef Husk__Guest__V1__Share Share;
typedef Husk__Guest__V1__Configure Configure;
typedef Husk__Guest__V1__Interface Interface;
typedef Husk__Guest__V1__Route Route;
typedef Husk__Guest__V1__Process Process;
typedef Husk__Guest__V1__Start Start;
typedef Husk__Guest__V1__Mount Mount;
typedef Husk__Guest__V1__MountExports MountExports;
typedef Husk__Guest__V1__Export Export;
typedef Husk__Guest__V1__ExportPart ExportPart;
typedef Husk__Guest__V1__KeepExports KeepExports;
typedef Husk__Guest__V1__RefreshNames RefreshNames;
typedef Husk__Guest__V1__RefreshFile RefreshFile;
typedef Husk__Guest__V1__Device Device;
typedef Husk__Guest__V1__DiskFound DiskFound;
typedef Husk__Guest__V1__Link Link;
typedef Husk__Guest__V1__File File;
typedef Husk__Guest__V1__CgroupFile CgroupFile;
typedef Husk__Guest__V1__Exec Exec;
typedef Husk__Guest__V1__Signal Signal;
typedef Husk__Guest__V1__Resize Resize;
typedef Husk__Guest__V1__Attach Attach;
typedef Husk__Guest__V1__Detached Detached;
typedef Husk__Guest__V1__Dial Dial;
typedef Husk__Guest__V1__ListenSockets ListenSockets;
typedef Husk__Guest__V1__HostSocket HostSocket;
typedef Husk__Guest__V1__KeepSockets KeepSockets;
typedef Husk__Guest__V1__AcceptSocket AcceptSocket;
typedef Husk__Guest__V1__SocketAccepted SocketAccepted;
typedef Husk__Guest__V1__ClockAdjustment ClockAdjustment;
typedef Husk__Guest__V1__Clocks Clocks;
typedef Husk__Guest__V1__ReadClocks ReadClocks;
typedef Husk__Guest__V1__HugePages HugePages;
typedef Husk__Guest__V1__HugeDirectory HugeDirectory;
typedef Husk__Guest__V1__ChangeFiles ChangeFiles;
typedef Husk__Guest__V1__FileChange FileChange;
typedef Husk__Guest__V1__KeepTrees KeepTrees;
typedef Husk__Guest__V1__WriteCgroup WriteCgroup;
typedef Husk__Guest__V1__ReadCgroup ReadCgroup;
typedef Husk__Guest__V1__ProcessCount ProcessCount;
typedef Husk__Guest__V1__OpenLog OpenLog;
typedef Husk__Guest__V1__Event Event;
typedef Husk__Guest__V1__Exited Exited;

// Fills `failure` from `error`, and points into it.
void failure_fill(Failure *failure, struct error *error);
