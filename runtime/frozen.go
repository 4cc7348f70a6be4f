package runtime

import (
	"fmt"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
)

// frozen encodes what never changes of a list's item. The kubelet asks for all pods every second, and encoding maps of
// labels and annotations is most of the work of a long list: an item carries them as encoded fields, which its
// receiver decodes like any others. What asks in this process sees only the fields that are set beside.
func frozen(item proto.Message) protoreflect.RawFields {
	data, err := proto.Marshal(item)
	if err != nil {
		panic(fmt.Sprintf("a message that came over the wire cannot be sent again: %v", err))
	}
	return data
}
