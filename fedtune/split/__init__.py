"""The base model as a service (gRPC) for clients that hold none; the only room that imports grpc.

`server.SplitServer` hosts a frozen decoder; `client.GrpcBase` is the `RemoteBase` at a client.
"""
