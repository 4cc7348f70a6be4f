package guest

import (
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestResolveModule(t *testing.T) {
	a := autoload{
		Modules: map[string][]string{
			"bridge": {"llc.ko", "stp.ko", "bridge.ko"}, "loop": {"loop.ko"}, "xt_mark": {"x_tables.ko", "xt_mark.ko"},
			"xt_mark2": {"x_tables.ko", "xt_mark2.ko"}, "nft_chain_nat": {"nf_tables.ko", "nft_chain_nat.ko"},
		},
		Aliases: map[string][]string{
			"rtnl_link_bridge": {"bridge"}, "block_major_7_*": {"loop"}, "ipt_MARK": {"xt_mark", "xt_mark2"}, "nft_chain_1_nat": {"nft_chain_nat"},
			"ip_set_hash:ip": {"loop"},
		},
	}
	for name, want := range map[string][]string{
		"bridge":           {"llc.ko", "stp.ko", "bridge.ko"},
		"rtnl-link-bridge": {"llc.ko", "stp.ko", "bridge.ko"},
		"nft-chain-1-nat":  {"nf_tables.ko", "nft_chain_nat.ko"},
		"nft-chain-nat":    {"nf_tables.ko", "nft_chain_nat.ko"},
		"ipt_MARK":         {"x_tables.ko", "xt_mark.ko", "xt_mark2.ko"},
		"block-major-7-3":  {"loop.ko"},
		"ip_set_hash:ip":   {"loop.ko"},
		"block-major-8-0":  nil,
		"net-pf-38":        nil,
		"[":                nil,
		"":                 nil,
	} {
		if d := cmp.Diff(want, a.resolve(name)); d != "" {
			t.Errorf("%q (-want +got):\n%s", name, d)
		}
	}
}
