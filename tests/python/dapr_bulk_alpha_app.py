"""The application of dapr_bulk_app.py, with the older name of the bulk call only, as SDKs for other languages have it."""

import grpc
from dapr.proto.runtime.v1 import appcallback_pb2 as messages
from dapr.proto.runtime.v1 import appcallback_pb2_grpc as callback

import dapr_bulk_app


class Application(dapr_bulk_app.Application):
    OnBulkTopicEvent = callback.AppCallbackServicer.OnBulkTopicEvent


def add(server):
    callback.add_AppCallbackServicer_to_server(Application(), server)
    alpha = grpc.unary_unary_rpc_method_handler(
        dapr_bulk_app.Application().OnBulkTopicEvent,
        request_deserializer=messages.TopicEventBulkRequest.FromString,
        response_serializer=messages.TopicEventBulkResponse.SerializeToString,
    )
    methods = {'OnBulkTopicEventAlpha1': alpha}
    service = grpc.method_handlers_generic_handler('dapr.proto.runtime.v1.AppCallbackAlpha', methods)
    server.add_generic_rpc_handlers([service])


dapr_bulk_app.serve(add)
