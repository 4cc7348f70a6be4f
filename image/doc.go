// Package image turns images that containerd has pulled into disks of a VM, and
// disks into images.
//
// Every image becomes one read-only EROFS file, built once and shared by all
// VMs that use it; the writable layer of a pod is a sparse ext4 file, its
// scratch disk. containerd stays the only image store: this package pulls
// nothing, and what it keeps is a cache beside it.
//
// An image that holds the disk of a machine is used as it lies in containerd: a
// read-only view of its snapshot stays mounted for all machines of the image,
// and each machine has a qcow2 overlay over the disk in it.
//
//	ref -> containerd image -> chain ID -> ROOT/images/<hex of chain ID>.erofs
//	                                    -> ROOT/views/<hex of chain ID>/disk/NAME.qcow2
//
// Invariants:
//
//   - A file under its final name is whole and on stable storage: it is written
//     under ROOT/tmp, synced and renamed. New empties ROOT/tmp.
//
//   - The name of an EROFS file is the chain ID of the image's layers, so images
//     that differ only in their configuration share one file.
//
//   - An owner (a container ID) is recorded on disk before the file it uses is
//     built or handed out, and holds one containerd lease on the image's content.
//
//   - An EROFS file is removed only when no owner is recorded for it and
//     containerd has no image with its layers.
//
//   - What lies in an image is data: no path of an image is ever resolved through
//     a symbolic link, no device or FIFO in it is ever opened.
//
//   - A view is mounted only while an owner is recorded for it, always read-only,
//     and has a lease of its own in containerd. The mount outlives this process;
//     what is lost with a reboot is mounted again when it is asked for.
//
//   - A disk is checked (package qcow2) before it is handed out; the result is kept
//     under the chain ID.
//
// The mounts of snapshots are made by this process, so it must see containerd's
// directories at the paths that containerd uses.
package image
