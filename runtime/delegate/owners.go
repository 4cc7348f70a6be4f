package delegate

// Owner says who answers a method.
type Owner string

// The owners of methods. A method that we do not know is Containerd's.
const (
	Containerd  Owner = "containerd"   // containerd, bytes unparsed
	ByHandler   Owner = "by handler"   // who serves the request's runtime handler
	ByPod       Owner = "by pod"       // who has the request's pod
	ByContainer Owner = "by container" // who has the request's container
	Merged      Owner = "merged"       // both; the answers are one, or an error
	Fallback    Owner = "fallback"     // containerd; the VM side where containerd does not have the method
	Identity    Owner = "identity"     // our name and version, with containerd's API version
	Union       Owner = "union"        // both streams as one
)

// owners places every method of both services. A method that is missing here fails the test that walks the
// service descriptors.
func owners() map[string]Owner {
	const (
		runtimeService = "/runtime.v1.RuntimeService/"
		imageService   = "/runtime.v1.ImageService/"
	)
	return map[string]Owner{
		runtimeService + "Version":             Identity,
		runtimeService + "Status":              Merged,
		runtimeService + "RuntimeConfig":       Fallback,
		runtimeService + "UpdateRuntimeConfig": Merged,

		runtimeService + "RunPodSandbox": ByHandler,
		runtimeService + "RestorePod":    ByHandler,

		runtimeService + "StopPodSandbox":            ByPod,
		runtimeService + "RemovePodSandbox":          ByPod,
		runtimeService + "PodSandboxStatus":          ByPod,
		runtimeService + "PodSandboxStats":           ByPod,
		runtimeService + "UpdatePodSandboxResources": ByPod,
		runtimeService + "PortForward":               ByPod,
		runtimeService + "CreateContainer":           ByPod,
		runtimeService + "CheckpointPod":             ByPod,

		runtimeService + "StartContainer":           ByContainer,
		runtimeService + "StopContainer":            ByContainer,
		runtimeService + "RemoveContainer":          ByContainer,
		runtimeService + "ContainerStatus":          ByContainer,
		runtimeService + "ContainerStats":           ByContainer,
		runtimeService + "UpdateContainerResources": ByContainer,
		runtimeService + "ReopenContainerLog":       ByContainer,
		runtimeService + "ExecSync":                 ByContainer,
		runtimeService + "Exec":                     ByContainer,
		runtimeService + "Attach":                   ByContainer,
		runtimeService + "CheckpointContainer":      ByContainer,

		runtimeService + "ListPodSandbox":        Merged,
		runtimeService + "ListContainers":        Merged,
		runtimeService + "ListContainerStats":    Merged,
		runtimeService + "ListPodSandboxStats":   Merged,
		runtimeService + "ListMetricDescriptors": Merged,
		runtimeService + "ListPodSandboxMetrics": Merged,

		runtimeService + "StreamPodSandboxes":      Union,
		runtimeService + "StreamContainers":        Union,
		runtimeService + "StreamContainerStats":    Union,
		runtimeService + "StreamPodSandboxStats":   Union,
		runtimeService + "StreamPodSandboxMetrics": Union,
		runtimeService + "GetContainerEvents":      Union,

		imageService + "ListImages":   Containerd,
		imageService + "StreamImages": Containerd,
		imageService + "ImageStatus":  Containerd,
		imageService + "PullImage":    Containerd,
		imageService + "RemoveImage":  Containerd,
		imageService + "ImageFsInfo":  Merged,
	}
}
