package runtime

import (
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/vmruntime/vmruntime/network"
	"github.com/vmruntime/vmruntime/qemu"
)

// message lets a protobuf message be a field of a JSON record.
type message[T proto.Message] struct{ M T }

// MarshalJSON writes the message in the JSON form of protobuf.
func (m message[T]) MarshalJSON() ([]byte, error) { return protojson.Marshal(m.M) }

// UnmarshalJSON reads what MarshalJSON wrote; fields that this version does not know are dropped.
func (m *message[T]) UnmarshalJSON(b []byte) error {
	var zero T
	m.M = zero.ProtoReflect().New().Interface().(T)
	return protojson.UnmarshalOptions{DiscardUnknown: true}.Unmarshal(b, m.M)
}

// podSpec is what is decided when a sandbox is made. It never changes.
type podSpec struct {
	Handler   string                                `json:"handler"`
	Config    message[*runtimeapi.PodSandboxConfig] `json:"config"`
	CreatedAt time.Time                             `json:"createdAt"`
	// UID is the user and group that QEMU runs as.
	UID         uint32 `json:"uid"`
	VCPUs       int    `json:"vcpus"`
	MemoryBytes int64  `json:"memoryBytes"`
	// HugeBytes is what a container VM has of huge pages of 2 MiB, beside its memory.
	HugeBytes int64 `json:"hugeBytes,omitempty"`
	// MaxVCPUs and MaxMemoryBytes are what the VM can come to have while it runs; 0 is no more.
	MaxVCPUs       int   `json:"maxVCPUs,omitempty"`
	MaxMemoryBytes int64 `json:"maxMemoryBytes,omitempty"`
}

// podStatus is what happened to a sandbox since.
type podStatus struct {
	Network *network.Attachment `json:"network,omitempty"`
	// ReadyAt is when RunPodSandbox was about to answer. Zero marks a half-made pod.
	ReadyAt   time.Time   `json:"readyAt,omitzero"`
	StoppedAt time.Time   `json:"stoppedAt,omitzero"`
	Guest     guestRecord `json:"guest"`
	// Resized is there if the pod has been resized.
	Resized *resized `json:"resized,omitempty"`
	// Capturing is set while a checkpoint is taken, or a machine taken back to one, which a daemon that is killed leaves stopped and frozen.
	Capturing bool `json:"capturing,omitempty"`
	// Frozen is set while the guest's own agent has its file systems frozen, which a daemon that is killed leaves so.
	Frozen bool `json:"frozen,omitempty"`
	// Held are the interfaces that the restored machine in the pod believes to have. The pod's network is held until it knows better.
	Held []checkpointInterface `json:"held,omitempty"`
}

// resized is what a pod may use since it was resized, and the size that its VM has for that.
type resized struct {
	Resources message[*runtimeapi.LinuxContainerResources] `json:"resources"`
	Overhead  message[*runtimeapi.LinuxContainerResources] `json:"overhead"`
	Size      vmSize                                       `json:"size"`
	// ToldCPU and ToldMemory say that UpdatePodSandboxResources has given that limit. Whoever tells the pod's, as the kubelet does before it raises
	// containers' and after it has lowered them, does not want it to follow those: it may be the pod's own, which containers without one have too.
	ToldCPU    bool `json:"toldCPU,omitempty"`
	ToldMemory bool `json:"toldMemory,omitempty"`
}

// guestRecord is the latest boot of a pod's guest.
type guestRecord struct {
	// Boot counts the guests that this sandbox had; a container belongs to the one it was started in.
	Boot  int               `json:"boot"`
	QEMU  *qemu.Record      `json:"qemu,omitempty"`
	Share *qemu.ShareRecord `json:"share,omitempty"`
	TPM   *qemu.TPMRecord   `json:"tpm,omitempty"`
	// Machine is the ID of the container that the guest is, if it boots a disk.
	Machine string `json:"machine,omitempty"`
	// Template is the key of the template that the guest began as, if it did. With PrivateMemory it can get no share.
	Template      string `json:"template,omitempty"`
	PrivateMemory bool   `json:"privateMemory,omitempty"`
	// Spare says that the guest had begun before its pod.
	Spare bool `json:"spare,omitempty"`
	// GrownFrom is the size that the guest has begun with, if that was not the pod's; Growing is set until it has come to the pod's.
	GrownFrom *vmSize `json:"grownFrom,omitempty"`
	Growing   bool    `json:"growing,omitempty"`
	// Disks are the serials of the image disks that are plugged in.
	Disks []string `json:"disks,omitempty"`
	// OOMKills is how many processes the node's kernel had killed in the pod's cgroup before this guest began.
	OOMKills uint64 `json:"oomKills,omitempty"`
}

// containerSpec is what is decided when a container is created. It never changes.
type containerSpec struct {
	PodID     string                               `json:"podID"`
	Config    message[*runtimeapi.ContainerConfig] `json:"config"`
	CreatedAt time.Time                            `json:"createdAt"`
	// ImageID is the image's config digest, ImageRef its repository digest, ImageName the name that it is known by.
	ImageID   string      `json:"imageID"`
	ImageRef  string      `json:"imageRef"`
	ImageName string      `json:"imageName"`
	Disk      imageDisk   `json:"disk"`
	Volumes   []imageDisk `json:"volumes,omitempty"`
	// BlockVolumes are those of a container that is no machine.
	BlockVolumes []blockVolume                      `json:"blockVolumes,omitempty"`
	Mounts       []resolvedMount                    `json:"mounts,omitempty"`
	OCI          *specs.Spec                        `json:"oci"`
	User         message[*runtimeapi.ContainerUser] `json:"user"`
	// StopSignal is what the image or the pod asks to be stopped with.
	StopSignal string `json:"stopSignal,omitempty"`
	LogPath    string `json:"logPath,omitempty"`
	// Restored is there if the container comes from a checkpoint.
	Restored *restoredSpec `json:"restored,omitempty"`
	// Machine is there if the container is a whole machine; then it has neither Disk nor OCI.
	Machine *machineSpec `json:"machine,omitempty"`
}

// imageDisk is a read-only EROFS file and the serial by which the guest finds it.
type imageDisk struct {
	Name   string `json:"name,omitempty"`
	Serial string `json:"serial"`
	Path   string `json:"path"`
}

// containerStatus is what happened to a container since.
type containerStatus struct {
	// Boot is the guest that the container was started in; 0 if it never was.
	Boot       int       `json:"boot,omitempty"`
	StartedAt  time.Time `json:"startedAt,omitzero"`
	FinishedAt time.Time `json:"finishedAt,omitzero"`
	ExitCode   int32     `json:"exitCode,omitempty"`
	Reason     string    `json:"reason,omitempty"`
	Message    string    `json:"message,omitempty"`
	// Resources are the limits last set by UpdateContainerResources.
	Resources *message[*runtimeapi.LinuxContainerResources] `json:"resources,omitempty"`
}

// Reasons of a container's end, as in ContainerStatus.reason. The first three are containerd's.
const (
	reasonCompleted   = "Completed"
	reasonError       = "Error"
	reasonOOMKilled   = "OOMKilled"
	reasonStartError  = "StartError"
	reasonVMFailed    = "VMFailed"
	reasonGuestFailed = "GuestFailed"
	reasonNodeReboot  = "VMLost"
)

// state follows from the recorded facts.
func (s containerStatus) state() runtimeapi.ContainerState {
	switch {
	case !s.FinishedAt.IsZero():
		return runtimeapi.ContainerState_CONTAINER_EXITED
	case !s.StartedAt.IsZero():
		return runtimeapi.ContainerState_CONTAINER_RUNNING
	default:
		return runtimeapi.ContainerState_CONTAINER_CREATED
	}
}

// running tells whether a process of the container may be alive.
func (s containerStatus) running() bool {
	return s.state() == runtimeapi.ContainerState_CONTAINER_RUNNING
}
