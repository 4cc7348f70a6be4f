// Package qemu describes, starts, re-attaches to and watches one virtual machine.
//
//	Machine (a value) -- Validate, Args --> command line
//	Start: open descriptors -> launcher (stopped) -> Place into cgroup -> namespaces, no root -> exec QEMU -> QMP answers
//	VM: QMP monitor, pidfd, hot-plug             Record (JSON) --> Attach by a later daemon
//
// Invariants:
//   - QEMU never runs as root. It has no capability, sees a minimal read-only root, an empty network and its own
//     IPC namespace, and gets disks, taps and sockets as descriptors.
//   - QEMU outlives the process that started it. Nothing it needs is a pipe to the daemon: its error output and
//     its monitor may lose their reader at any time.
//   - A process is only signalled through a pidfd that was checked against its recorded start time.
//   - A guest that ends stays paused until a daemon has seen how it ended. So no outcome is lost while the daemon is
//     away, at the price of the memory held until it is back.
//   - The guest's console goes to a ring of 64 KiB in QEMU's own memory. A guest that floods it fills no
//     disk and blocks nobody; the last 64 KiB are part of the error that tells how the guest failed. Or, with
//     Machine.ConsolePipe, it goes to a pipe of 1 MiB and from there to a Spool of some MiB, and a guest that floods
//     both waits: then every byte has its offset, and none is lost or doubled.
//   - A VM with its own firmware, disk or Machine.Type differs from one that boots our kernel in nothing but its Machine. QEMU opens
//     no image by name: disks, what is below them and EFI's flash come as descriptors, and no image's header names another.
//   - A state goes in and out of QEMU through a pipe, and memory that outlives a QEMU is a descriptor of the caller's: no QEMU
//     has a file of its own. A clone's private memory is never written back, whatever that QEMU does, if its file is sealed.
//   - Every device and block node is named after its serial, tag or ID; the state of hot-plug is asked of QEMU,
//     never remembered.
package qemu
