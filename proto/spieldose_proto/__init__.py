"""The gRPC contract, generated from the .proto files beside this one: `make proto`."""
