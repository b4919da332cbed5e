"""Takes events one by one, on the SDK's own stubs: what it does not define is answered with UNIMPLEMENTED."""

import json
import os
import time
from concurrent import futures

import grpc
from dapr.proto.runtime.v1 import appcallback_pb2 as messages
from dapr.proto.runtime.v1 import appcallback_pb2_grpc as callback

import story


class Application(callback.AppCallbackServicer):
    def OnTopicEvent(self, request, context):
        text = json.loads(request.data)['text']
        if text.startswith('slow'):
            # Work that takes its time.
            time.sleep(0.4)
        story.verdict(request.topic, text, id=request.id)
        return messages.TopicEventResponse(status=0)


server = grpc.server(futures.ThreadPoolExecutor(max_workers=4))
callback.add_AppCallbackServicer_to_server(Application(), server)
server.add_insecure_port(f'127.0.0.1:{os.environ["APP_PORT"]}')
server.start()
server.wait_for_termination()
