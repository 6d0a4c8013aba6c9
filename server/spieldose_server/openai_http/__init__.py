"""OpenAI's HTTP interface over the same generation, access and admission as gRPC."""
