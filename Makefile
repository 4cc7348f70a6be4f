# Everything is built, run and tested from here; `make help` lists the targets.
# The tests need root and a Debian 12 machine, real or virtual.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

# /usr/local/go is where install-deps puts Go if there is none, or too old a one.
export PATH := /usr/local/go/bin:$(PATH):/usr/sbin:/sbin

PACKAGES := ./...
GUEST := out/guest
GUEST_INPUTS := go.mod go.sum $(shell find deploy/guest cmd/vmagent agent -name '*.go' ! -name '*_test.go' 2>/dev/null)

.PHONY: run run-machine cluster cluster-down test test-cluster check build guest tools lint generate generate-check unit system critest critest-soak conformance bench install-deps clean help

run: install-deps build guest node-tools ## bring up a private node and run a normal pod and a VM pod (KEEP=1 leaves it up)
	go run ./test/cmd/node $(if $(KEEP),-keep)

run-machine: install-deps build guest node-tools ## bring up a private node and boot Debian from a disk as a pod (KEEP=1 leaves it up)
	go run ./test/cmd/node -machine $(if $(KEEP),-keep)

cluster: install-deps build guest cluster-tools ## bring up a Kubernetes of one node on vmruntime, in the background
	go run ./test/cmd/cluster up

cluster-down: ## take it down
	go run ./test/cmd/cluster down

test: install-deps ## everything: lint, unit, golden, node, VM and critest (root, under 40 minutes)
	$(MAKE) build guest tools
	$(MAKE) generate-check lint
	$(MAKE) unit
	$(MAKE) system
	$(MAKE) critest

test-cluster: install-deps build guest cluster-tools ## what Kubernetes does with pods, on a cluster, as containers and as VMs
	go run ./test/cmd/disks tiny fio >/dev/null
	go test ./test/cluster -v -count=1 -timeout 2h -parallel 3 -whole

check: lint ## lint, unit and golden tests (under 2 minutes, no root)
	go test -short $(PACKAGES)

build: ## the programs, in bin/
	go build -trimpath -o bin/vmruntime ./cmd/vmruntime
	CGO_ENABLED=0 go build -trimpath -ldflags '-s -w' -o bin/vmagent ./cmd/vmagent

guest: $(GUEST)/manifest.json ## the guest's kernel and initramfs, in out/guest

$(GUEST)/manifest.json: $(GUEST_INPUTS)
	go run ./deploy/guest -o $(GUEST)
	@touch $@

tools: node-tools cluster-tools ## containerd, runc, CNI plugins, critest, a Kubernetes and the linter at their pinned versions, in the cache
	go run ./test/tools/build golangci-lint

.PHONY: node-tools
node-tools:
	go run ./test/tools/build containerd runc cni cri-tools cri-ginkgo

.PHONY: cluster-tools
cluster-tools: node-tools
	go run ./test/tools/build etcd kubernetes coredns metrics-server

lint: ## vet, format, golangci-lint, and that arm64 compiles
	go vet $(PACKAGES)
	GOARCH=arm64 CGO_ENABLED=0 go build -o /dev/null ./cmd/... ./deploy/...
	@unformatted=$$(gofmt -l $$(git ls-files '*.go')); [ -z "$$unformatted" ] || { echo "not formatted: $$unformatted"; exit 1; }
	$$(go run ./test/tools/build golangci-lint)/golangci-lint run $(PACKAGES)

generate: ## code of the protocols, and files made from the configuration
	mkdir -p out/generate
	go build -o out/generate/ google.golang.org/protobuf/cmd/protoc-gen-go github.com/containerd/ttrpc/cmd/protoc-gen-go-ttrpc google.golang.org/grpc/cmd/protoc-gen-go-grpc
	cd agent/agentpb && PATH=$(CURDIR)/out/generate:$$PATH protoc -I . \
		--go_out=. --go_opt=paths=source_relative --go-ttrpc_out=. --go-ttrpc_opt=paths=source_relative agent.proto
	cd runtime/vmpb && PATH=$(CURDIR)/out/generate:$$PATH protoc -I . \
		--go_out=. --go_opt=paths=source_relative --go-grpc_out=. --go-grpc_opt=paths=source_relative vm.proto
	go test ./runtime -run TestConfigFiles -update -count=1

# Fails when a generated file is not what its source makes.
generate-check: generate
	git diff --exit-code -- agent/agentpb runtime/vmpb docs/configuration.md deploy/vmruntime.toml

unit: ## unit and golden tests, with the race detector
	go test -race -short -timeout 10m $(PACKAGES)

# Disks are made first: a pull waits for its image half a minute at most.
system: ## tests that need root, a node or a VM
	go run ./test/cmd/disks >/dev/null
	go test -timeout 30m -p 2 $$(go list $(PACKAGES) | grep -v '/test/vm$$')
	go test -timeout 60m ./test/vm

critest: build guest node-tools ## the CRI's conformance suite on containerd, the default handler and the handler vm
	go run ./test/cmd/critest

critest-soak: build guest node-tools ## the same three times on each node, in parallel: nothing leaks (15 minutes)
	go run ./test/cmd/critest -rounds 3 -parallel 2 -out out/critest-soak

conformance: build guest cluster-tools ## Kubernetes' own NodeConformance specs, with containers and with VMs
	go run ./test/tools/build cri-ginkgo kubernetes-e2e
	go run ./test/cmd/conformance

bench: build guest cluster-tools ## measure, print a table and write out/bench.json
	go run ./test/bench -o out/bench.json

install-deps: ## install what is needed, on Debian 12 as root
	test/tools/install-deps.sh

clean: ## remove what was built; the cache of tools stays
	rm -rf bin out

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/\1\t\2/' | expand -t 14
